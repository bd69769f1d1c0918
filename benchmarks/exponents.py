"""How costs grow: local exponents between neighboring sizes; nothing but attention may grow faster than its size.

OMP_NUM_THREADS=1 python benchmarks/exponents.py --output benchmarks/results
"""

import itertools
import math
import os
import statistics
from collections.abc import Callable

import torch
from image_processors import picture
from runner import Goal, Record, arguments, publish, take_turns
from shapes import fusion_model, one_thread, pixels

from fusedvlm.processing import FusedVLMImageProcessor

Ways = dict[int, Callable[[], object]]
# Measured apart: user time per picture and per image is constant; from 4 pictures, or 16 images, on their memory comes
# anew from the system each time (3,300 and 2,200 page faults each, where smaller batches have none).
FAULTS = "user time per item is constant; the rest is page faults, for large results are new memory each time"
ATTENTION = ("fusion over views", "m of one image")  # whose rows become longer


def build() -> dict[str, Ways]:
    """What grows: {size: work of that size}."""
    model = fusion_model(width=128, vision_layers=3, fusion_layers=4)
    tokens, ids = model.config.tokens_per_view, torch.arange(100, 110)
    features = torch.randn(10, tokens, 128, generator=torch.Generator().manual_seed(0))
    image, processor = pixels(10), FusedVLMImageProcessor()
    small = picture(640, 480)
    pictures = {width * width * 3 // 4: picture(width, width * 3 // 4) for width in (1000, 2000, 4000)}

    def fuse(views: int, images: int = 1, questions: int = 1, m: int = 64) -> Callable[[], object]:
        asked = images * questions
        return torch.no_grad()(
            lambda: model.fuse(
                view_features=features[:views].repeat(images, 1, 1), image_num_views=[views] * images,
                question_input_ids=ids.repeat(asked), question_lengths=[10] * asked, num_visual_tokens=m,
                image_num_questions=[questions] * images,
            )
        )  # fmt: skip

    def encode(views: int) -> Callable[[], object]:
        return torch.no_grad()(lambda: model.get_view_features(image[:views]))

    def sweep(number: int) -> Callable[[], object]:
        counts = [1 + round(767 * place / max(number - 1, 1)) for place in range(number)]
        return torch.no_grad()(
            lambda: model.fuse_every_count(
                counts, view_features=features, image_num_views=[10], question_input_ids=ids, question_lengths=[10]
            )
        )

    return {
        "vision over views": {views: encode(views) for views in (2, 5, 10)},
        "fusion over views": {views: fuse(views) for views in (2, 5, 10)},
        "images of a batch": {images: fuse(2, images=images) for images in (2, 4, 8, 16)},
        "questions about an image": {number: fuse(10, questions=number, m=8) for number in (1, 4, 16)},
        "m of one image": {m: fuse(10, m=m) for m in (64, 256, 768)},
        "m in one pass": {number: sweep(number) for number in (2, 10, 50)},
        "pixels of a picture": {
            size: (lambda held=held: processor(held, return_tensors="pt")) for size, held in pictures.items()
        },
        "pictures of a batch": {
            number: (lambda number=number: processor([small] * number, return_tensors="pt")) for number in (1, 4, 16)
        },
    }


def main() -> None:
    """Measure and write the record."""
    options = arguments(__doc__, rounds=5).parse_args()
    one_thread()
    load = os.getloadavg()[0]
    record = Record(
        "exponents",
        "Scaling exponents",
        "log(time ratio) / log(size ratio) between neighboring sizes: 1 is "
        "proportional. Width 128, 3 vision and 4 fusion layers, where attention weighs more than at the paper's size.",
    )
    for what, ways in build().items():
        times = take_turns({str(size): way for size, way in ways.items()}, options.rounds)
        record.add(what, times, None)
        sizes = list(ways)
        found = []
        for small, large in itertools.pairwise(sizes):
            grown = statistics.median(b / a for a, b in zip(times[str(small)], times[str(large)], strict=True))
            found.append(math.log(grown) / math.log(large / small))
        record.facts[what] = ", ".join(
            f"{value:.2f} ({a:,} to {b:,})" for value, a, b in zip(found, sizes[:-1], sizes[1:], strict=True)
        )
        limit = 1.6 if what in ATTENTION else 1.15
        record.goals.append(Goal(f"largest exponent, {what}", limit, max(found), at_most=True, unmet=FAULTS))
    publish(record, options.output, load)


if __name__ == "__main__":
    main()

"""All ten m of the paper for one image and one question: one pass for each, or one for all.

OMP_NUM_THREADS=1 python benchmarks/sweep.py --output benchmarks/results
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from runner import Goal, Record, arguments, publish, take_turns
from shapes import PAPER_COUNTS, fusion_model, largest_difference, one_thread, pixels, question

NAIVE, VIEWS, CACHE, ONE = (
    "one `fuse` per m",
    "view tokens shared",
    "start_fusion, continue_fusion per m",
    "fuse_every_count",
)


def build(
    views: int = 10, counts: tuple[int, ...] = PAPER_COUNTS, **sizes: Any
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """The four ways; each gives the states at every m."""
    model, image, asked = fusion_model(**sizes), pixels(views), question()
    packed = {"image_num_views": [views], **asked}

    def states(m: int, **given: Any) -> torch.Tensor:
        return model.fuse(**given, num_visual_tokens=m, **packed)[0].segment_states[0]

    def shared() -> list[torch.Tensor]:
        features = model.get_view_features(image)[0]
        return [states(m, view_features=features) for m in counts]

    def cached() -> list[torch.Tensor]:
        cache = model.start_fusion(model.get_view_features(image)[0])
        return [model.continue_fusion(cache, asked["question_input_ids"], m) for m in counts]

    ways = {
        NAIVE: lambda: [states(m, pixel_values=image) for m in counts],
        VIEWS: shared,
        CACHE: cached,
        ONE: lambda: model.fuse_every_count(counts, pixel_values=image, **packed)[0][0],
    }
    return {name: torch.no_grad()(way) for name, way in ways.items()}


def main() -> None:
    """Measure and write the record."""
    options = arguments(__doc__, rounds=5).parse_args()
    one_thread()
    load = os.getloadavg()[0]
    ways = build()
    expected = ways[NAIVE]()
    worst = {name: largest_difference(way(), expected) for name, way in ways.items()}
    record = Record(
        "sweep",
        "A sweep over m",
        "Ten views of 336 x 336, a question of 10 tokens, m = "
        + ", ".join(map(str, PAPER_COUNTS))
        + "; from pixels. Width 128, 6 vision and 4 fusion layers, about the paper's proportions.",
    )
    record.add(
        "ten m",
        take_turns(ways, options.rounds),
        NAIVE,
        {n: f"differs by {d:.1e}" for n, d in worst.items() if n != NAIVE},
    )
    record.goals = [
        Goal("all m at once over one pass per m", 6, record.gain("ten m", ONE)),
        Goal("largest difference", 1e-5, worst[ONE], at_most=True),
    ]
    publish(record, options.output, load)


if __name__ == "__main__":
    main()

"""Pictures to HD views: the short way against arrays and against LlavaNext's image processor at equal views.

OMP_NUM_THREADS=1 python benchmarks/image_processors.py --output benchmarks/results
"""

import os
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from runner import Goal, Record, Spread, arguments, publish, ratio, take_turns
from shapes import one_thread
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMImageProcessorPil, image_processing_fusedvlm_common

SIZES = ((336, 336), (640, 480), (2000, 1500), (4000, 3000))
ARRAYS, SHORT, PIL, ROUGH, BYTES, PEER = (
    "as arrays, the earlier way", "torchvision backend", "PIL backend", "exact=False", "uint8_views",
    "LlavaNext, 3 x 3 tiles",
)  # fmt: skip


def picture(width: int, height: int) -> Image.Image:
    """Blocks of many sizes with some noise, the same every time."""
    generator = np.random.default_rng(0)
    levels = np.zeros((height, width, 3))
    for size in (3, 12, 48):
        blocks = Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))
        levels += np.asarray(blocks.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((levels / 3 + generator.normal(0, 8, levels.shape)).clip(0, 255).astype(np.uint8))


def build(image: Image.Image) -> dict[str, Callable[[], torch.Tensor]]:
    """Every way to its views."""
    exact, pil = FusedVLMImageProcessor(), FusedVLMImageProcessorPil()
    rough, small = FusedVLMImageProcessor(exact=False), FusedVLMImageProcessor(uint8_views=True)
    peer = LlavaNextImageProcessor(image_grid_pinpoints=[[1008, 1008]], size={"shortest_edge": 336},
                                   crop_size={"height": 336, "width": 336})  # fmt: skip

    def arrays() -> torch.Tensor:
        with patch.object(image_processing_fusedvlm_common, "as_picture", lambda _: None):
            return exact(np.asarray(image), return_tensors="pt")["pixel_values"]

    def run(processor: Callable) -> Callable[[], torch.Tensor]:
        return lambda: processor(image, return_tensors="pt")["pixel_values"]

    return {ARRAYS: arrays, SHORT: run(exact), PIL: run(pil), ROUGH: run(rough), BYTES: run(small), PEER: run(peer)}


def differences(image: Image.Image) -> str:
    """Gray levels between `exact=False` and exact, in tiles and in the global view."""
    views = [FusedVLMImageProcessor(uint8_views=True, exact=exact)(image, return_tensors="pt")["pixel_values"].int()
             for exact in (True, False)]  # fmt: skip
    gap = (views[0] - views[1]).abs()
    tiles, whole, mean = int(gap[1:].max()), int(gap[0].max()), float(gap[0].float().mean())
    return f"off by at most {tiles} in tiles, {whole} (mean {mean:.2f}) in the global view"


def main() -> None:
    """Measure and write the record."""
    options = arguments(__doc__, rounds=9).parse_args()
    one_thread()
    load = os.getloadavg()[0]
    record = Record(
        "image_processors",
        "Pictures to HD views",
        "A decoded picture to normalized views of 336 x 336, HD-9: 10 "
        "views. Both backends give the bits that arrays give. LlavaNext resizes by torch and has no Lanczos in its "
        "global view.",
    )
    for size in SIZES:
        image, case = picture(*size), f"{size[0]} x {size[1]}"
        ways = build(image)
        assert torch.equal(ways[SHORT](), ways[ARRAYS]()), case
        times = take_turns(ways, options.rounds)
        record.add(case, times, ARRAYS, {ROUGH: differences(image)})
        floor = "Pillow's two resizes, which are exact, take longer alone; threads share them where cores are free"
        record.goals += [
            Goal(f"{case}: over arrays", 1.5, record.gain(case, SHORT)),
            Goal(f"{case}: over LlavaNext", 1, ratio(times[PEER], times[SHORT]).median, unmet=floor),
            Goal(f"{case}: exact=False over LlavaNext", 1, ratio(times[PEER], times[ROUGH]).median),
        ]
    record.facts = threads(options.rounds)
    publish(record, options.output, load)


def threads(rounds: int) -> dict[str, str]:
    """Wall time of a batch of four on one and on two threads: it says less, the busier the machine."""
    images, processor = [picture(2000, 1500)] * 4, FusedVLMImageProcessor()
    ways: dict[str, Callable[[], object]] = {}
    for number in (1, 2):

        def way(number: int = number) -> None:
            torch.set_num_threads(number)
            processor(images, return_tensors="pt")
            torch.set_num_threads(1)

        ways[str(number)] = way
    times = take_turns(ways, rounds, time.perf_counter)
    gain = ratio(times["1"], times["2"])
    return {
        "four pictures of 2000 x 1500, wall ms on one thread": Spread.of([1e3 * t for t in times["1"]]).text(),
        "the same on two threads of a shared machine, times as fast": gain.text(),
    }


if __name__ == "__main__":
    main()

"""Has anything become slower? Re-measures the cheap ratios and compares them with their record.

Every case is a fast way and a slow way to one result; what is recorded is how many times as fast the fast one is, on
one thread, by CPU time. A case whose ratio falls 25 % below its record is measured again, longer, and then fails.

    make bench-guard
    OMP_NUM_THREADS=1 python benchmarks/guard.py --write        # a new record, after a change that was meant
    OMP_NUM_THREADS=1 python benchmarks/guard.py --slow sweep   # see it fail: the fast way of a case runs twice
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import decode
import divergence
import image_processors
import mixed_rows
import numpy as np
import sweep
import torch
from runner import RESULTS, Spread, environment, ratio, take_turns
from shapes import fusion_model, one_thread, pixels, question

from fusedvlm.scaling.divergence.estimators import pair_curves

RECORD = RESULTS / "guard.json"
TOLERANCE = 0.25
Pair = tuple[Callable[[], object], Callable[[], object]]  # slow, fast


def image_processor() -> Pair:
    """A picture through arrays, and straight to its views."""
    ways = image_processors.build(image_processors.picture(640, 480))
    return ways[image_processors.ARRAYS], ways[image_processors.SHORT]


def all_counts() -> Pair:
    """One pass per m, and one for all."""
    ways = sweep.build(views=3, counts=(1, 16, 64, 128, 256), width=64, vision_layers=3, fusion_layers=2)
    return ways[sweep.NAIVE], ways[sweep.ONE]


def rows() -> Pair:
    """Unlike rows padded to the longest, and in buckets."""
    ways = mixed_rows.build(width=64)
    return ways[mixed_rows.PADDED], ways[mixed_rows.BATCH]


def questions() -> Pair:
    """The image again, and a question behind its cache."""
    model = fusion_model(width=128, vision_layers=2, fusion_layers=2)
    image, asked = pixels(4), question(15)
    with torch.no_grad():
        cache = model.start_fusion(model.get_view_features(image)[0])
    again = torch.no_grad()(lambda: model.fuse(pixel_values=image, image_num_views=[4], num_visual_tokens=8, **asked))
    return again, lambda: [model.continue_fusion(cache, asked["question_input_ids"], 8) for _ in range(4)]


def decoding() -> Pair:
    """An answer of the LLM alone, and of the variant: the ratio is below one, and must stay near it."""
    ways = decode.build(32_000)
    return lambda: ways[decode.PLAIN](50), lambda: ways[decode.OURS](50)


def curves() -> Pair:
    """Divergence by three vectorized products with the cumulated sums of all corners, and by running sums."""
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=(400, 1024)).astype(np.float32) for _ in range(2))
    return lambda: divergence.vectorized(a, b), lambda: pair_curves(a, b)


def children_cpu() -> float:
    """CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process(*arguments: str) -> Callable[[], object]:
    """A fresh interpreter."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def command(*words: str) -> Callable[[], Pair]:
    """`import transformers`, and a command of ours."""
    return lambda: (process("-c", "import transformers"), process("-m", "fusedvlm.cli", *words))


# Cases by name: how to build their pair, and the clock that sees their work.
CASES: dict[str, tuple[Callable[[], Pair], Callable[[], float]]] = {
    "processor": (image_processor, time.process_time),
    "sweep": (all_counts, time.process_time),
    "rows": (rows, time.process_time),
    "questions": (questions, time.process_time),
    "decode": (decoding, time.process_time),
    "divergence": (curves, time.process_time),
    "help": (command("--help"), children_cpu),
    "laws": (command("scaling", "fit", "paper"), children_cpu),
}


def measure(name: str, rounds: int, is_slowed: bool = False) -> Spread:
    """How many times as fast the fast way of a case is."""
    build, clock = CASES[name]
    slow, fast = build()
    ways = {"slow": slow, "fast": (lambda: (fast(), fast())) if is_slowed else fast}
    times = take_turns(ways, rounds, clock)
    return ratio(times["slow"], times["fast"])


def fallen(found: dict[str, float], recorded: dict[str, float], tolerance: float = TOLERANCE) -> dict[str, str]:
    """What became slower, each with its two ratios; a case without a record, or a record without a case, is one too."""
    problems = {name: "has no record; run with --write" for name in found if name not in recorded}
    problems |= {name: "is recorded, but was not measured" for name in recorded if name not in found}
    for name, gain in found.items():
        if name in recorded and not gain >= (1 - tolerance) * recorded[name]:
            problems[name] = f"{gain:.3g} times as fast, {recorded[name]:.3g} recorded"
    return problems


def look(
    names: list[str], rounds: int, slowed: list[str], recorded: dict[str, float], tolerance: float = TOLERANCE
) -> dict[str, Spread]:
    """Ratios of some cases; what fell is measured again with more rounds, for the machine may have been busy."""
    found = {name: measure(name, rounds, name in slowed) for name in names}
    gains = {name: found[name].median for name in names if name in recorded}
    for name in fallen(gains, {name: recorded[name] for name in gains}, tolerance):
        found[name] = measure(name, 3 * rounds, name in slowed)
    return found


def main() -> None:
    """Measure, compare, and say what fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"which ones; all by default: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share of a record that may be lost")
    parser.add_argument("--slow", action="append", default=[], choices=[*CASES], help="run this one's fast way twice")
    parser.add_argument("--write", action="store_true", help="record what is found instead of comparing it")
    options = parser.parse_args()
    names = options.cases or [*CASES]
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown case {unknown[0]}; there are {', '.join(CASES)}")
    one_thread()
    load = os.getloadavg()[0]
    recorded = {} if options.write or not RECORD.exists() else json.loads(RECORD.read_text(encoding="utf-8"))["gains"]
    found = look(names, options.rounds, options.slow, recorded, options.tolerance)
    for name, spread in found.items():
        print(f"{name:<12} {spread.text():<28} recorded {recorded.get(name, float('nan')):.3g}")
    gains = {name: round(spread.median, 3) for name, spread in found.items()}
    if options.write:
        document = {"gains": gains, "environment": environment(load)}
        RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return
    problems = fallen(gains, {name: gain for name, gain in recorded.items() if name in names}, options.tolerance)
    if problems:
        sys.exit("Slower than its record:\n" + "\n".join(f"  {name}: {text}" for name, text in problems.items()))


if __name__ == "__main__":
    main()

"""Running sums against a direct double loop: the same numbers, how much faster?

The direct loop computes every cosine of the definitions once, from rows that are already normalized, and every D(n) by
summing from the start; its sums over (i, j) for all n are then read from the table of cosines. That favors the loop:
summing anew for every n, as the definition is written, would cost N times more.

    python benchmarks/divergence.py --tokens 800 --width 4096 --output benchmarks/results
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np

from fusedvlm.scaling.divergence.estimators import CURVES, pair_curves


def direct(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """All D(n) and psi(n), one cosine at a time."""
    count = len(a)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    tables = np.zeros((3, count, count))
    for i in range(count):
        for j in range(count):
            tables[0, i, j] = u[i] @ u[j]
            tables[1, i, j] = v[i] @ v[j]
            tables[2, i, j] = u[i] @ v[j]
    same = np.array([tables[2, :n, :n].trace() / n for n in range(1, count + 1)])
    cross = np.zeros((3, count))
    for n in range(2, count + 1):
        corner = tables[:, :n, :n]
        cross[:, n - 1] = (corner.sum((1, 2)) - np.trace(corner, axis1=1, axis2=2)) / (n * (n - 1))
    distance = np.array([np.linalg.norm((a[:n] - b[:n]).sum(0)) for n in range(1, count + 1)])
    return dict(zip(CURVES, [distance, same, *cross], strict=True))


def vectorized(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """All D(n) and psi(n) by three matrix products and two cumulative sums: what one would write in NumPy."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    count = np.arange(1, len(a) + 1)
    same = np.cumsum(np.einsum("ij,ij->i", u, v)) / count
    cross = []
    for table in (u @ u.T, v @ v.T, u @ v.T):
        corners = np.diagonal(np.cumsum(np.cumsum(table, axis=0), axis=1))
        with np.errstate(all="ignore"):
            cross.append(np.where(count > 1, (corners - np.cumsum(np.diagonal(table))) / (count * (count - 1)), 0))
    distance = np.linalg.norm(np.cumsum(a - b, axis=0), axis=1)
    return dict(zip(CURVES, [distance, same, *cross], strict=True))


def timed(function, *arguments, repeats: int) -> tuple[float, dict]:
    """Median seconds and the result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def main() -> None:
    """Measure, compare, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    common = generator.normal(size=options.width)
    a, b = ((generator.normal(size=(options.tokens, options.width)) + common).astype(np.float32) for _ in range(2))
    pair_curves(a, b)
    fast, ours = timed(pair_curves, a, b, repeats=options.repeats)
    middle, also = timed(vectorized, a, b, repeats=options.repeats)
    slow, theirs = timed(direct, a.astype(np.float64), b.astype(np.float64), repeats=1)
    worst = max(float(np.abs((ours[k] - theirs[k]) / np.maximum(np.abs(theirs[k]), 1e-3)).max()) for k in CURVES)
    worst = max(
        worst, max(float(np.abs((also[k] - theirs[k]) / np.maximum(np.abs(theirs[k]), 1e-3)).max()) for k in CURVES)
    )
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    lines = [
        "# Divergence of one pair of branches: running sums against a direct double loop",
        "",
        f"N = {options.tokens} tokens, d = {options.width}, random states, float32 in, float64 sums.",
        "",
        "| method | seconds |",
        "|---|---|",
        f"| direct double loop over i and j | {slow:.3f} |",
        f"| three matrix products and cumulative sums, median of {options.repeats} | {middle:.4f} |",
        f"| running sums (`pair_curves`), median of {options.repeats} | {fast:.4f} |",
        "",
        f"Ratio: {slow / fast:.0f} to the double loop, whose loops are Python's, {middle / fast:.1f} to the products.",
        f"Largest relative difference over all n and all five curves: {worst:.1e}.",
        "",
        f"Hardware: {platform.machine()} CPU, {os.cpu_count()} cores, OMP_NUM_THREADS={threads}.",
        f"Python {platform.python_version()}, numpy {np.__version__}. Date: {datetime.date.today()}.",
        f"Command: `python {shlex.join(sys.argv)}`",
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if options.output is not None:
        (options.output / f"divergence_cpu_{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    if worst > 1e-6 or slow < 100 * fast:
        sys.exit(f"Expected a difference below 1e-6 and a ratio above 100, got {worst:.1e} and {slow / fast:.0f}.")


if __name__ == "__main__":
    main()

"""The identity loss of stage 1 without its N x N matrix: equal to the direct formula, how much faster and smaller?

N = 24,576 query states of width 1,024 are 32 samples at m = 768. Each form runs in a process of its own, forward and
backward; memory is the rise of its peak over what the states themselves take. The reference in double precision sums
the direct formula over blocks of rows, since its N x N matrices would not fit beside each other.

    python benchmarks/identity_loss.py --output benchmarks/results
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_losses import identity_loss


def direct(states: torch.Tensor) -> torch.Tensor:
    """The formula as it is written: mean of (V V^T - I)^2."""
    unit = F.normalize(states, dim=-1)
    return (unit @ unit.T - torch.eye(len(unit), device=unit.device, dtype=unit.dtype)).square().mean()


def direct_by_blocks(states: torch.Tensor, block: int = 1024) -> tuple[float, torch.Tensor]:
    """The direct formula and its gradient in double precision: 4 / N^2 (V V^T - I) V, through the normalization."""
    states = states.double().requires_grad_()
    unit = F.normalize(states, dim=-1)
    rows, total, slope = unit.detach(), 0.0, torch.zeros_like(states)
    for start in range(0, len(rows), block):
        gram = rows[start : start + block] @ rows.T
        gram.diagonal(start).sub_(1)
        total += gram.square().sum().item()
        slope[start : start + block] = gram @ rows
    unit.backward(4 / len(rows) ** 2 * slope)
    return total / len(rows) ** 2, states.grad


def resident_bytes() -> int:
    """Memory of this process now."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Rise of memory over the start of the block: the allocator's peak on a GPU, sampled every 5 ms on a CPU."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self):
        self.peak, self.running = 0, True
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = resident_bytes()
            self.sampler = threading.Thread(target=self._sample, daemon=True)
            self.sampler.start()
        return self

    def _sample(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.running = False
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.sampler.join()
        self.rise = self.peak - self.start


def random_states(options, dtype=torch.float32) -> torch.Tensor:
    """States with a common direction, so that the loss is not only its expectation for random rows."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(options.rows, options.width, generator=generator) + 0.3
    return states.to(options.device, dtype)


def measure(options) -> dict:
    """Seconds, peak memory and value of one form, forward and backward."""
    function = {"direct": direct, "ours": identity_loss}[options.form]
    states = random_states(options).requires_grad_()
    small = states.detach()[:64].clone().requires_grad_()
    function(small).backward()  # libraries are loaded before the clock starts
    with PeakMemory(options.device) as memory:
        start = time.perf_counter()
        loss = function(states)
        loss.backward()
        value = loss.item()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory.rise, "loss": value}


def differences(options) -> dict[str, float]:
    """Largest relative differences from the direct formula in double precision."""
    value, slope = direct_by_blocks(random_states(options))
    found = {}
    for dtype in (torch.float64, torch.float32):
        states = random_states(options, dtype).requires_grad_()
        loss = identity_loss(states)
        loss.backward()
        found[f"{dtype} forward"] = abs(loss.item() - value) / value
        found[f"{dtype} backward"] = float((states.grad.double() - slope).norm() / slope.norm())
    return {name.removeprefix("torch."): number for name, number in found.items()}


def run_form(options, form: str) -> dict:
    """`measure` in a process of its own, the median of the repeats."""
    command = [sys.executable, __file__, "--form", form, "--device", options.device]
    command += ["--rows", str(options.rows), "--width", str(options.width)]
    runs = [json.loads(subprocess.check_output(command)) for _ in range(options.repeats)]
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def report(options, forms: dict[str, dict], worst: dict[str, float]) -> str:
    """The record, as Markdown."""
    direct_form, ours = forms["direct"], forms["ours"]
    gpu = options.device == "cuda"
    hardware = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    lines = [
        "# Identity loss of stage 1: direct against d x d",
        "",
        f"N = {options.rows:,} states, d = {options.width:,}, float32, forward and backward; median of "
        f"{options.repeats}.",
        "",
        "| form | seconds | peak memory over the states, MB |",
        "|---|---|---|",
        *(f"| {name} | {form['seconds']:.3f} | {form['bytes'] / 1e6:.0f} |" for name, form in forms.items()),
        "",
        f"Ratio: {direct_form['seconds'] / ours['seconds']:.1f} in time, {direct_form['bytes'] / ours['bytes']:.1f} in "
        "memory.",
        "",
        "| relative difference from the direct formula in float64 | |",
        "|---|---|",
        *(f"| {name} | {number:.1e} |" for name, number in worst.items()),
        "",
        f"Hardware: {hardware}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'all')}.",
        f"Python {platform.python_version()}, torch {torch.__version__}. Date: {datetime.date.today()}.",
        f"Command: `python {shlex.join(sys.argv)}`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, compare, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24_576, help="N")
    parser.add_argument("--width", type=int, default=1024, help="d")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for the record")
    parser.add_argument("--form", choices=["direct", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        sys.stdout.write(json.dumps(measure(options)))
        return
    forms = {form: run_form(options, form) for form in ("direct", "ours")}
    worst = differences(options)
    text = report(options, forms, worst)
    sys.stdout.write(text)
    if options.output is not None:
        name = f"identity_loss_{options.device}_{datetime.date.today()}.md"
        (options.output / name).write_text(text, encoding="utf-8")
    times, bytes_ = (forms["direct"][name] / forms["ours"][name] for name in ("seconds", "bytes"))
    if max(worst[name] for name in worst if name.startswith("float64")) > 1e-6 or times < 10 or bytes_ < 20:
        sys.exit(f"Expected 10 x in time and 20 x in memory, equal to 1e-6; got {times:.1f}, {bytes_:.1f}, {worst}.")


if __name__ == "__main__":
    main()

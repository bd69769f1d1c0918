"""CPU time until the command line and the library answer: `python benchmarks/startup.py [--repeats 5] [--record FILE]`.

CPU time (user + system) of a fresh process, median of some repeats after one run that fills the file cache; wall time
would say how busy the machine is.
"""

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

CASES = {
    "import typer": ["-c", "import typer"],
    "fusedvlm --help": ["-m", "fusedvlm.cli", "--help"],
    "fusedvlm check --help": ["-m", "fusedvlm.cli", "check", "--help"],
    "fusedvlm plan --help": ["-m", "fusedvlm.cli", "plan", "--help"],
    "fusedvlm scaling fit paper": ["-m", "fusedvlm.cli", "scaling", "fit", "paper", "--resamples", "10"],
    "import fusedvlm": ["-c", "import fusedvlm"],
    "import transformers models": ["-c", "from transformers import LlamaForCausalLM, CLIPVisionModel"],
    "the same, then our model": [
        "-c",
        "from transformers import LlamaForCausalLM, CLIPVisionModel; import fusedvlm; fusedvlm.FusedVLMModel",
    ],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print, and write a record where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    times = {}
    for name, arguments in CASES.items():
        cpu_seconds(arguments)
        times[name] = statistics.median(cpu_seconds(arguments) for _ in range(options.repeats))
    allowed = 1.5 * times["import typer"] + 0.3
    added = times["the same, then our model"] - times["import transformers models"]
    lines = ["| process | CPU s |", "|---|---|", *(f"| {name} | {seconds:.2f} |" for name, seconds in times.items())]
    lines += [
        "",
        f"`fusedvlm --help` may take 1.5 x typer + 0.3 s = {allowed:.2f} s; it takes {times['fusedvlm --help']:.2f} s.",
        f"Our first model adds {added:.2f} s to transformers' own (goal: at most 0.1 s).",
    ]
    print("\n".join(lines))
    if options.record:
        versions = ", ".join(f"{name} {version(name)}" for name in ("typer", "torch", "transformers"))
        where = f"Python {platform.python_version()}, {versions}; {platform.machine()}, {os.cpu_count()} CPUs"
        head = [
            "# Start-up",
            "",
            f"`python benchmarks/startup.py --repeats {options.repeats}`, {datetime.date.today()}, {where}.",
            "CPU time of a fresh process, median; other work ran on the machine.",
            "",
        ]
        options.record.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

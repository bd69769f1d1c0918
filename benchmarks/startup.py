"""CPU time and memory until the command line and the library answer.

CPU time (user + system) and largest resident memory of a fresh process, after one run that fills the file cache.

    python benchmarks/startup.py --output benchmarks/results
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from runner import Goal, Record, arguments, publish, take_turns

MODELS = "from transformers import LlamaForCausalLM, CLIPVisionModel"
VARIANT = """
import sys
from fusedvlm import FusedVLMConfig
FusedVLMConfig(num_visual_tokens=256, fusion_row_per_turn=True).save_pretrained(sys.argv[1])
"""
WITH_MEMORY = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""
HELPS = (
    "check",
    "plan",
    "train",
    "train contrastive",
    "scaling fit",
    "info",
    "profile",
    "describe",
    "data check",
    "push",
)


def cases(variant: str) -> dict[str, list[str]]:
    """Arguments of Python, by what they do."""
    command = ["-m", "fusedvlm.cli"]
    return {
        "import typer": ["-c", "import typer"],
        "import transformers": ["-c", "import transformers"],
        "import fusedvlm": ["-c", "import fusedvlm"],
        "fusedvlm --help": [*command, "--help"],
        **{f"fusedvlm {words} --help": [*command, *words.split(), "--help"] for words in HELPS},
        "fusedvlm info (paper's size)": [*command, "info", variant],
        "fusedvlm scaling fit paper": [*command, "scaling", "fit", "paper"],
        "import transformers models": ["-c", MODELS],
        "the same, then our model": ["-c", f"{MODELS}; import fusedvlm; fusedvlm.FusedVLMModel"],
    }


def children_cpu() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(words: list[str]) -> None:
    """One process, to its end."""
    subprocess.run([sys.executable, *words], check=True, capture_output=True)


def memory(words: list[str]) -> float:
    """Largest resident memory of a process, in MB."""
    command = [sys.executable, "-c", WITH_MEMORY, sys.executable, *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def main() -> None:
    """Measure and write the record."""
    options = arguments(__doc__, rounds=5).parse_args()
    load = os.getloadavg()[0]
    record = Record(
        "startup", "Start-up", "Fresh processes; the first round, which fills the file cache, is not counted."
    )
    with tempfile.TemporaryDirectory() as folder:
        variant = str(Path(folder) / "variant")
        run(["-c", VARIANT, variant])
        every = cases(variant)
        times = take_turns(
            {name: lambda words=words: run(words) for name, words in every.items()}, options.rounds, children_cpu
        )
        sizes = {name: memory(words) for name, words in every.items()}
    record.add("process", times, None, {name: f"{size:.0f} MB" for name, size in sizes.items()})
    seconds = {row.way: row.milliseconds.median / 1e3 for row in record.rows}
    helps = {name: value for name, value in seconds.items() if name.endswith("--help")}
    slowest = max(helps, key=lambda name: helps[name])
    pairs = zip(times["the same, then our model"], times["import transformers models"], strict=True)
    added = statistics.median(one - other for one, other in pairs)
    record.goals = [
        Goal("import fusedvlm, s", 0.05, seconds["import fusedvlm"], at_most=True),
        Goal(f"slowest --help ({slowest}), s", 0.5, helps[slowest], at_most=True),
        Goal("info, s", 0.6, seconds["fusedvlm info (paper's size)"], at_most=True),
        Goal("info, MB", 200, sizes["fusedvlm info (paper's size)"], at_most=True),
        Goal(
            "scaling fit paper, s",
            1.5,
            seconds["fusedvlm scaling fit paper"],
            at_most=True,
            unmet="at the edge of it, with the load",
        ),
        Goal(
            "our first model over transformers' own, s", 0.1, added, at_most=True, unmet="within the spread of either"
        ),
    ]
    publish(record, options.output, load)


if __name__ == "__main__":
    main()

"""What every benchmark shares: ways that take turns, CPU time, spread, and a record as JSON and Markdown.

On a machine that others use, wall time says how busy it is. So ways take turns within every round, what is compared is
process time on one thread, and a ratio is the median over rounds of the ratio within a round, with its quartiles.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "torchvision", "pillow", "numpy", "scipy")


@dataclass
class Spread:
    """Median and quartiles of some rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return cls(statistics.median(values), low, high, len(values))

    def text(self, digits: int = 3) -> str:
        """`median (low to high)`, in as many significant digits."""
        median, low, high = (
            f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}" for value in (self.median, self.low, self.high)
        )
        return f"{median} ({low} to {high})"


@dataclass
class Row:
    """One way in one case: milliseconds of CPU, and how many times as fast it is as the way it is compared with."""

    case: str
    way: str
    milliseconds: Spread
    gain: Spread | None = None
    note: str = ""


@dataclass
class Goal:
    """A number that was to be reached; `unmet` says why it was not."""

    what: str
    goal: float
    found: float
    at_most: bool = False
    unmet: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it was."""
        return self.found <= self.goal if self.at_most else self.found >= self.goal


@dataclass
class Record:
    """What a benchmark found."""

    name: str
    title: str
    text: str
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(
        self, case: str, times: Mapping[str, Sequence[float]], against: str | None, notes: Mapping[str, str] = {}
    ) -> None:
        """A row per way; gains are those over the way `against`."""
        for way, seconds in times.items():
            gain = None if against is None or way == against else ratio(times[against], seconds)
            spread = Spread.of([1e3 * value for value in seconds])
            self.rows.append(Row(case, way, spread, gain, notes.get(way, "")))

    def gain(self, case: str, way: str) -> float:
        """Median gain of a row."""
        return next(row.gain.median for row in self.rows if (row.case, row.way) == (case, way) and row.gain)


def ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Times over others, within each round."""
    return Spread.of([one / other for one, other in zip(times, others, strict=True)])


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """CPU seconds of every way, round by round; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = clock()
            way()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def cpu_model() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Of the code that was measured; with a plus where it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def environment(load_before: float) -> dict[str, Any]:
    """Where and with what it was measured."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": commit(),
        "date": str(datetime.date.today()),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "versions": versions,
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python {shlex.join(sys.argv)}",
    }


def markdown(record: Record, where: Mapping[str, Any]) -> str:
    """The record as a page."""
    lines = [f"# {record.title}", "", record.text, ""]
    if record.rows:
        lines += ["| case | way | CPU ms | times as fast | |", "|---|---|---|---|---|"]
        for row in record.rows:
            gain = "" if row.gain is None else row.gain.text()
            lines.append(f"| {row.case} | {row.way} | {row.milliseconds.text()} | {gain} | {row.note} |")
        lines += ["", "Medians over rounds in which the ways took turns, with quartiles.", ""]
    if record.facts:
        lines += [*(f"- {name}: {value}" for name, value in record.facts.items()), ""]
    if record.goals:
        lines += ["| goal | wanted | found | |", "|---|---|---|---|"]
        for goal in record.goals:
            sign = "<=" if goal.at_most else ">="
            said = "met" if goal.is_met else f"not met: {goal.unmet or 'no reason recorded'}"
            lines.append(f"| {goal.what} | {sign} {goal.goal:g} | {goal.found:.3g} | {said} |")
        lines.append("")
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines += [
        f"{where['cpu']}, {where['cores']} cores, {where['threads'] or 'all'} thread(s) used; load average "
        f"{where['load'][0]} before and {where['load'][1]} after, of which this program is 1.",
        f"{versions}. Commit {where['commit']}, {where['date']}.",
        f"Command: `{where['command']}`",
    ]
    return "\n".join(lines) + "\n"


def arguments(description: str, rounds: int = 7) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="counted rounds, after one that warms up")
    parser.add_argument("--output", type=Path, help="folder for NAME.json and NAME.md, such as benchmarks/results")
    return parser


def publish(record: Record, output: Path | None, load_before: float) -> None:
    """Print the page; with `output` write it, and the numbers as JSON beside it."""
    where = environment(load_before)
    page = markdown(record, where)
    sys.stdout.write(page)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        goals = [{**asdict(goal), "is_met": goal.is_met} for goal in record.goals]
        document = {**asdict(record), "goals": goals, "environment": where}
        (output / f"{record.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (output / f"{record.name}.md").write_text(page, encoding="utf-8")

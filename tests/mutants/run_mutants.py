"""`make mutants`: change one line of the library at a time and see whether the test that must notice does.

The tree is copied aside, once per process, and only the copies are changed. Every mutation names the tests that must fail
with it. First these tests run on the unchanged copy, where all of them must pass. A run fails when

- a mutation no longer applies: its text is not there exactly once (the code moved on; move the mutation along),
- its tests cannot run: no such test, an error before any test, tests that fail without the mutation too,
- it survives: its tests still pass.

    python tests/mutants/run_mutants.py                  all of them, on two processes
    python tests/mutants/run_mutants.py --only exif      those whose name, file or tests contain the word
    python tests/mutants/run_mutants.py --list           what there is, without running anything
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

sys.path.insert(0, str(Path(__file__).parent))
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
NOT_COPIED = {
    ".git",
    ".venv",
    ".venv-oldest",
    "runs",
    "build",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    ".ci",
}
TIMEOUT = 300  # seconds a mutation's tests may take: a mutation that makes them hang is noticed too
SLOWEST = 900  # seconds for all named tests of one file on the unchanged tree, on a busy machine
PASSED, FAILED = "0", "1"  # exit codes of pytest


@dataclass(frozen=True)
class Outcome:
    """What became of one mutation: "caught", "survived", or "broken" when its tests say nothing about it."""

    mutant: Mutant
    kind: str
    seconds: float
    detail: str = ""


def problem(mutant: Mutant, root: Path = ROOT) -> str | None:
    """Why a mutation cannot be applied to a tree, or None."""
    path = root / mutant.file
    if not path.is_file():
        return f"{mutant.file} does not exist"
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1:
        return f"its text stands {count} times in {mutant.file}, not once: {mutant.old!r}"
    for test in mutant.tests:
        file, _, name = test.partition("::")
        if not (root / file).is_file():
            return f"{file} does not exist"
        if name and f"def {name.partition('[')[0]}(" not in (root / file).read_text(encoding="utf-8"):
            return f"{file} has no test {name}"
    if path.suffix == ".py":
        try:
            changed = ast.dump(ast.parse(text.replace(mutant.old, mutant.new)))
        except SyntaxError as error:
            return f"with it {mutant.file} is no Python: {error}"
        if changed == ast.dump(ast.parse(text)):
            return "it changes nothing but the form of the code"
    return None


def not_copied(folder: str, names: list[str]) -> set[str]:
    """What stays behind: at the root results and environments, caches everywhere. `trainers/runs` is code."""
    return {name for name in names if name == "__pycache__" or (Path(folder) == ROOT and name in NOT_COPIED)}


class Copy:
    """A copy of the tree in which tests run; `fusedvlm` is imported from there and from nowhere else."""

    def __init__(self, folder: Path):
        self.tree, self.site = folder / "tree", folder / "site"
        shutil.copytree(ROOT, self.tree, ignore=not_copied, symlinks=True)
        self._link_packages()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": str(self.site),
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._clock = time.time()
        self.log = folder / "log"
        where = subprocess.run(
            [sys.executable, "-c", "import fusedvlm, fusedvlm.trainers as t; print(fusedvlm.__file__, t.__file__)"],
            cwd=self.site,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if where.stdout.count(str(self.site)) != 2:
            raise SystemExit(f"The copy is not what Python imports: {where.stdout.strip() or where.stderr[-500:]}")
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_tests.py"))],
            cwd=self.site,  # what tests start finds the copy, too, and not the installed package's parts
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self.server.stdout.readline().strip() != "ready":
            raise SystemExit(
                "The process that runs the tests does not start: try `python tests/mutants/fork_tests.py`."
            )

    def _link_packages(self) -> None:
        """`site/fusedvlm` with every package of the tree at its place, as pyproject.toml maps them."""
        home = self.site / "fusedvlm"
        home.mkdir(parents=True)
        packages = tomllib.loads((self.tree / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
        for name, folder in packages.items():
            parts = name.split(".")
            if len(parts) == 1:
                for path in (self.tree / folder).iterdir():
                    (home / path.name).symlink_to(path)
            elif len(parts) == 2:
                (home / parts[1]).symlink_to(self.tree / folder)
            # Deeper ones lie inside the folder of the package above them.
        for path in self.tree.iterdir():  # pages and metadata that tests look for beside the package
            if not (path / "__init__.py").exists():
                (self.site / path.name).symlink_to(path)

    def test(self, tests: tuple[str, ...] | list[str], seconds: float = TIMEOUT) -> str:
        """Run tests up to the first that fails: pytest's exit code, or "hang"; what it said is in `self.log`."""
        request = {"tests": [str(self.tree / test) for test in tests], "log": str(self.log), "seconds": seconds}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline().strip() or "no answer"

    def said(self, most: int) -> str:
        """The end of what the last tests printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-most:]

    def close(self) -> None:
        """End the process that runs the tests."""
        self.server.stdin.close()
        self.server.wait(10)

    def write(self, file: str, text: str) -> None:
        """Write a source so that Python sees that it changed, even within the same second."""
        path = self.tree / file
        path.write_text(text, encoding="utf-8")
        self._clock += 2
        os.utime(path, (self._clock, self._clock))

    def try_out(self, mutant: Mutant) -> Outcome:
        """Apply a mutation, run its tests, take it back."""
        original = (self.tree / mutant.file).read_text(encoding="utf-8")
        started = time.monotonic()
        self.write(mutant.file, original.replace(mutant.old, mutant.new))
        try:
            code = self.test(mutant.tests)
        finally:
            self.write(mutant.file, original)
        seconds = time.monotonic() - started
        if code == "hang":
            return Outcome(mutant, "caught", seconds, "its tests do not end")
        kind = {FAILED: "caught", PASSED: "survived"}.get(code, "broken")
        return Outcome(mutant, kind, seconds, self.said(800) if kind == "broken" else "")


def baseline(copy: Copy, tests: list[str]) -> str | None:
    """What is wrong with the tests on the unchanged tree, or None; one pytest for a file, so that fixtures are shared."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    for file, names in by_file.items():
        started = time.monotonic()
        code = copy.test(names, SLOWEST)
        say(f"  {time.monotonic() - started:5.1f} s  {file}")
        if code != PASSED:
            return f"{file}: its tests do not pass on the unchanged tree (pytest ends with {code}):\n{copy.said(1500)}"
    return None


def run(mutants: list[Mutant], processes: int) -> list[Outcome]:
    """Every mutation, `processes` at a time, told as they end."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: Queue[Copy] = Queue()
        for number in range(processes):
            copies.put(Copy(Path(folder) / str(number)))
        every = list(copies.queue)
        started = time.monotonic()

        def within(work, argument):
            copy = copies.get()
            try:
                return work(copy, argument)
            finally:
                copies.put(copy)

        files = sorted({test.partition("::")[0] for mutant in mutants for test in mutant.tests})
        wanted = sorted({test for mutant in mutants for test in mutant.tests})
        shares = [[test for test in wanted if test.partition("::")[0] == file] for file in files]
        with ThreadPoolExecutor(processes) as pool:
            say(f"{len(wanted)} tests on the unchanged tree ...")
            found = [wrong for wrong in pool.map(lambda share: within(baseline, share), shares) if wrong]
            if found:
                raise SystemExit("\n".join(found))
            say(
                f"they pass ({time.monotonic() - started:.0f} s); now {len(mutants)} mutations on {processes} processes"
            )
            for outcome in pool.map(lambda mutant: within(Copy.try_out, mutant), mutants):
                outcomes.append(outcome)
                say(
                    f"[{len(outcomes)}/{len(mutants)}] {outcome.kind:8} {outcome.seconds:5.1f} s  {outcome.mutant.name}"
                    + (f"  ({outcome.detail})" if outcome.kind == "caught" and outcome.detail else "")
                )
        for copy in every:
            copy.close()
    return outcomes


def say(text: str) -> None:
    """Progress goes to standard error."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Exit code 0 when every mutation is caught, 1 when not, 2 for wrong use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run those whose name, file or tests contain this")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    arguments = parser.parse_args()
    word = arguments.only.lower()
    mutants = [m for m in MUTANTS if word in f"{m.name} {m.file} {' '.join(m.tests)}".lower()]
    if not mutants or arguments.processes < 1:
        parser.error(f"--only {arguments.only!r} matches nothing" if not mutants else "--processes must be 1 or more")
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name}\n    {mutant.file}: {mutant.old!r} -> {mutant.new!r}\n    {' '.join(mutant.tests)}")
        return 0
    stale = [f"{mutant.name}: {why}" for mutant in mutants if (why := problem(mutant))]
    if stale:
        say("\n".join(["These mutations no longer apply; move them along with the code:", *stale]))
        return 1
    started = time.monotonic()
    outcomes = run(mutants, arguments.processes)
    for outcome in outcomes:
        if outcome.kind != "caught":
            say(
                f"\n{outcome.kind}: {outcome.mutant.name}\n  {outcome.mutant.file}: {outcome.mutant.old!r} -> {outcome.mutant.new!r}"
            )
            say(f"  {' '.join(outcome.mutant.tests)}\n{outcome.detail}")
    caught = sum(outcome.kind == "caught" for outcome in outcomes)
    minutes = (time.monotonic() - started) / 60
    print(f"{caught} of {len(outcomes)} mutations caught in {minutes:.1f} minutes on {arguments.processes} processes")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

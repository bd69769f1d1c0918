"""Start the processes of a lab, show what they do, and end with all of them or with the first that fails."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from typing import Any

from fusedvlm.console import progress, say
from fusedvlm.files import parse_json

from .lab_jobs import LabFolder

# What a bar says between its name and its clock.
BAR = re.compile(r"^(?P<name>[^|]*?):\s+(?P<share>\d+%)\|")


class Worker:
    """A process of `lab_worker`, with the last line of its bars and of its errors."""

    def __init__(self, lab: LabFolder, number: int, threads: int) -> None:
        command = [sys.executable, "-m", "fusedvlm.lab.lab_worker", str(lab.folder), "--command", lab.command]
        command += ["--workers", str(lab.workers), "--threads", str(threads), "--parent", str(os.getpid())]
        command += [] if lab.deadline is None else ["--deadline", str(lab.deadline)]
        self.number, self.job, self.doing = number, "", ""
        self.said: list[str] = []
        self.finished: list[tuple[str, str]] = []
        # Nothing in the folder that the user happens to stand in is imported in place of a library's module.
        safe = {**os.environ, "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=safe)
        self.threads = [
            threading.Thread(target=self._follow_jobs, daemon=True),
            threading.Thread(target=self._follow_bars, daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def _follow_jobs(self) -> None:
        for line in self.process.stdout or ():
            if not line.startswith('{"event"'):
                continue  # said by a library
            event: Any = parse_json(line, "a worker's line")
            self.job, self.doing = (event["job"], "") if event["event"] == "start" else ("", "")
            if event["event"] == "done":
                self.finished.append((event["job"], event["detail"]))

    def _follow_bars(self) -> None:
        for line in self.process.stderr or ():  # universal newlines: a bar that returns to its start is a line
            if match := BAR.match(line.strip()):
                self.doing = f"{match['name']} {match['share']}"
            elif line.strip():
                self.said = [*self.said, line.strip()][-30:]
                if "clock allowed" in line or "was cut" in line:
                    say(f"{self.job}: {line.strip()}")

    @property
    def line(self) -> str:
        """What it is doing."""
        return f"{self.job or 'waiting'}{': ' if self.job and self.doing else ''}{self.doing}"

    def stop(self) -> None:
        """End it, and what it started, if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for thread in self.threads:
            thread.join(5)


def run_workers(lab: LabFolder, workers: int, threads: int) -> None:
    """Until every job is done.

    Raises:
        RuntimeError: naming the job and the last line of a process that failed; the others are ended, and the same
            command continues.
    """
    (lab.folder / "variants").mkdir(parents=True, exist_ok=True)
    todo = lab.unfinished()
    if not todo:
        return
    started = [Worker(lab, number, threads) for number in range(min(workers, len(todo)))]
    bar = progress(total=len(lab.jobs), description="lab", initial=len(lab.jobs) - len(todo))
    try:
        with contextlib.closing(bar):
            while any(worker.process.poll() is None for worker in started):
                _show(bar, started)
                _check(started)
                time.sleep(0.3)
            _show(bar, started)
            _check(started)
    finally:
        for worker in started:
            worker.stop()
    if left := lab.unfinished():
        raise RuntimeError(f"The lab's processes ended before {left[0].name} was done; run the same command again.")


def _show(bar: Any, workers: list[Worker]) -> None:
    for worker in workers:
        while worker.finished:
            name, took = worker.finished.pop(0)
            bar.update(1)
            if bar.disable or not sys.stderr.isatty():
                say(f"{name}: done in {took}")
    bar.set_postfix_str(" | ".join(worker.line for worker in workers))


def _check(workers: list[Worker]) -> None:
    for worker in workers:
        if worker.process.poll() not in (None, 0):
            for thread in worker.threads:
                thread.join(5)
            said = worker.said[-1] if worker.said else f"exit code {worker.process.returncode}"
            raise RuntimeError(f"{worker.job or 'A process of the lab'} failed: {said}")

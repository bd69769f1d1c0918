"""Many slow calls, several at a time, each result on the disk at once: a killed run goes on where it was.

Tasks are made when their turn comes and forgotten when they are done, so a million of them take no more memory than a
few.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fusedvlm.console import progress, say

from .journal import Journal
from .llm_client import Declined, Unanswered

SILENT = 20  # calls in a row without an answer: the server is gone, or refuses everything
REFUSING = 500  # refusals in a row although some calls were answered
SHOWN = 5  # messages about calls that failed; the rest are counted


@dataclass(frozen=True)
class Task:
    """A call to make: `key` names it and everything its result depends on, `label` whom it is about."""

    key: str
    call: Callable[[], dict[str, Any]]
    label: str = ""


def run_tasks(
    tasks: Iterable[Task],
    journal: Journal,
    concurrency: int,
    description: str,
    total: int | None = None,
    on_stop: Callable[[], None] | None = None,
) -> int:
    """Make the calls that the journal does not have yet, each key once.

    What is refused for itself (`Declined`) goes to the journal too, with its kind, and is not asked again. While
    nothing at all was answered refusals are only kept in mind: should all be refused, something else is wrong, and the
    next run asks anew.

    Args:
        tasks: what is to be done; made one by one, a few ahead of the calls.
        journal: open; gets `{"key", **result}` of each.
        concurrency: calls at a time.
        description: of the progress bar.
        total: how many tasks there are, when that is known.
        on_stop: called when the run ends early, to wake calls that wait.

    Returns:
        How many calls stayed without an answer.

    Raises:
        ValueError: when every call is refused, or one for a reason that holds for all.
        Unanswered: when 20 calls in a row had no answer.
    """
    outcome = _Outcome(journal)
    running: dict[Future, Task] = {}
    pending: set[str] = set()
    with progress(description=description, total=total) as bar, ThreadPoolExecutor(concurrency) as pool:
        todo = (task for task in tasks if _is_new(task, journal, pending, outcome.held, bar))
        try:
            while True:
                for task in islice(todo, 2 * concurrency - len(running)):
                    pending.add(task.key)
                    running[pool.submit(task.call)] = task
                if not running:
                    return outcome.finish()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    pending.discard(task.key)
                    bar.update()
                    outcome.take(task, future)
        except BaseException:
            if on_stop is not None:
                on_stop()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # on an error or Ctrl-C: what has not begun never will


def _is_new(task: Task, journal: Journal, pending: set[str], held: dict[str, Any], bar: Any) -> bool:
    if task.key in pending or task.key in held or task.key in journal:
        bar.update()
        return False
    return True


class _Outcome:
    """What became of the calls so far."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.has_answer = journal.count("answer") > 0
        self.held: dict[str, dict[str, Any]] = {}  # refusals before the first answer
        self.failed = self.silent = self.refused = self.said = 0

    def take(self, task: Task, future: Future) -> None:
        """Count one finished call."""
        try:
            entry = {"kind": "answer", "key": task.key, **future.result()}
        except Declined as error:
            self._decline(task, error)
            return
        except Unanswered as error:
            self.failed, self.silent = self.failed + 1, self.silent + 1
            self._say(f"{task.label or task.key}: {error}")
            if self.silent >= SILENT:
                raise
            return
        self.journal.add(entry)
        self.silent = self.refused = 0
        self.has_answer = True
        self._release()

    def _decline(self, task: Task, error: Declined) -> None:
        self.silent = 0
        self._say(f"{task.label or task.key}: {error.kind}: {error}")
        self.held[task.key] = {"key": task.key, "kind": error.kind, "id": task.label, "detail": str(error)}
        if self.has_answer:
            self._release()
        self.refused += 1
        if self.refused >= (REFUSING if self.has_answer else SILENT):
            raise ValueError(f"{self.refused} requests in a row without a usable reply, the last: {str(error)[:180]}")

    def _release(self) -> None:
        for entry in self.held.values():
            self.journal.add(entry)
        self.held.clear()

    def _say(self, message: str) -> None:
        self.said += 1
        if self.said <= SHOWN:
            say(message[:300])
        elif self.said == SHOWN + 1:
            say("Further ones are counted and not shown.")

    def finish(self) -> int:
        """Settle what was only kept in mind; gives the number of calls without an answer."""
        refused = [entry["detail"] for entry in self.held.values() if entry["kind"] == "refused"]
        if refused:
            raise ValueError(f"All {len(refused)} requests were refused, the last: {refused[-1][:180]}")
        self._release()
        return self.failed

"""Many slow calls, several at a time, each result on the disk at once: a killed run goes on where it was."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fusedvlm.console import progress, say
from fusedvlm.data.sample_files import Journal

from .llm_client import Unanswered

SILENT = 20  # calls in a row without an answer: the server is gone


@dataclass(frozen=True)
class Task:
    """A call to make: `key` names it and everything its result depends on."""

    key: str
    call: Callable[[], dict[str, Any]]


def run_tasks(tasks: Iterable[Task], journal: Journal, concurrency: int, description: str) -> int:
    """Make the calls that the journal does not have yet, each key once.

    Args:
        tasks: what is to be done.
        journal: open; gets `{"key", **result}` of each.
        concurrency: calls at a time.
        description: of the progress bar.

    Returns:
        How many calls stayed without an answer.

    Raises:
        ValueError: when a call is refused.
        Unanswered: when 20 calls in a row had no answer.
    """
    distinct = {task.key: task for task in tasks}
    todo = iter([task for key, task in distinct.items() if key not in journal])
    done = sum(key in journal for key in distinct)
    running: dict[Future, Task] = {}
    failed = in_a_row = 0
    with (
        progress(description=description, total=len(distinct), initial=done) as bar,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        try:
            while True:
                for task in islice(todo, 2 * concurrency - len(running)):
                    running[pool.submit(task.call)] = task
                if not running:
                    return failed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    bar.update()
                    try:
                        journal.add({"key": task.key, **future.result()})
                        in_a_row = 0
                    except Unanswered as error:
                        failed, in_a_row = failed + 1, in_a_row + 1
                        say(str(error))
                        if in_a_row >= SILENT:
                            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # on an error or Ctrl-C: what has not begun never will

"""A process that pushes a family as often as it is told to, each time in a child that can be killed.

Imports cost a second and a kill must cost a process, so the imports are done once and every push runs in a fork.

Protocol on standard input and output: "run" -> the child's pid; "go" -> its exit code (negative: killed by that signal).
"""

import os
import pickle
import sys
from pathlib import Path

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import PushError
from fusedvlm.hub_cards.push.collection import collect
from fusedvlm.hub_cards.push.push_repository import push
from fusedvlm.retry import RetryPolicy

TITLE = "Tiny family"


def work(releases) -> int:
    """One push; 0 when everything is done."""
    hub = Hub(retry_policy=RetryPolicy(attempts=4, first_wait=0.01, timeout=5.0))
    try:
        push(releases, hub, public=True)
        collect(hub, TITLE, "ada", {r.repo_id: f"m = {r.num_visual_tokens}" for r in releases}, private=False)
    except PushError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def main(path: Path) -> None:
    """Serve the protocol until the input ends."""
    releases = pickle.loads(path.read_bytes())
    for _ in sys.stdin:
        ready, start = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(ready, 1)
            code = work(releases)
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()
        os.write(start, b"x")
        _, status = os.waitpid(child, 0)
        os.close(ready)
        os.close(start)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A release beside the branch that readers see: committed and tagged on a branch of its own before main moves.

A tag that is refused, a network that dies or a process that is killed then leaves no card that pins a tag which does
not exist, and no family on two releases. The branch goes when main has followed; as long as it is there, the same push
goes on where it stopped.
"""

from collections.abc import Iterable
from functools import partial

from fusedvlm.console import say
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import AGAIN, PushError

from .committing import try_commit, verify
from .difference import State, difference, list_branches, look
from .push_jobs import Job

PREFIX = "fusedvlm-push-"


def branch_of(tag: str) -> str:
    """The branch that a release is staged on."""
    return PREFIX + tag


def has_readers(state: State) -> bool:
    """Whether somebody may be reading the main branch: it is public, or holds an earlier release."""
    return not state.private or bool(state.tags)


def staging_branches(state: State | None) -> list[str]:
    """Branches that pushes left in a repository."""
    return [] if state is None else sorted(name for name in state.branches if name.startswith(PREFIX))


def stage(hub: Hub, job: Job) -> str:
    """Commit a release to its own branch; returns the commit, whose tree is verified.

    Raises:
        PushError: in one line.
    """
    branch = branch_of(job.release.tag)
    ensure_branch(hub, job.repo_id, branch, job.known.head)
    for attempt in range(1, hub.retry_policy.attempts + 1):
        state = look(hub, job.repo_id, branch)
        if state is None:
            raise PushError(f"{job.repo_id}: not found any more; was it deleted or renamed meanwhile?", 404)
        change = difference(hub, job.repo_id, job.files, state)
        if not change:
            return state.head
        made = try_commit(hub, job, change, state.head, attempt, revision=branch)
        if made is not None:
            return verify(hub, job, change, made.oid)
    raise AssertionError("the last attempt returns or raises")


def ensure_branch(hub: Hub, repo_id: str, branch: str, start: str) -> None:
    """Create a branch unless it is there, and look: a gateway may have said yes in the Hub's place."""
    for _ in range(hub.retry_policy.attempts):
        if branch in list_branches(hub, repo_id):
            return
        hub.ask(repo_id, lambda: hub.api.create_branch(repo_id, branch=branch, revision=start, exist_ok=True))
    if branch not in list_branches(hub, repo_id):
        raise PushError(f"{repo_id}: the Hub accepts the branch {branch} and does not show it; {AGAIN}")


def remove_branches(hub: Hub, repo_id: str, branches: Iterable[str]) -> None:
    """Delete staging branches; one that stays does no harm, so a refusal is said and no more."""
    for branch in branches:
        try:
            hub.ask(repo_id, partial(hub.api.delete_branch, repo_id, branch=branch))
        except PushError as error:
            if error.status != 404:  # gone already
                say(f"{error} (the branch {branch} is left behind and can be deleted)")

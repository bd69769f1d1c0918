"""Commits of a push: one attempt, its operations, and the look at what came of it."""

from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import CALL_ERRORS, PushError, status_of, unwrap

from .difference import Difference, list_files
from .push_jobs import Job

COMMIT_PREFIX = "fusedvlm push: "  # how this tool finds its own last commit


def try_commit(hub: Hub, job: Job, change: Difference, parent: str, attempt: int, **target: Any) -> CommitInfo | None:
    """One attempt at the commit: what the Hub says about it, or None after the wait when it is worth another look.

    Args:
        change: what the commit has to do.
        parent: commit on top of which alone it may go.
        attempt: number of this attempt, from 1.
        target: where, as `HfApi.create_commit` takes it; the main branch by default.
    """
    title = message(job)
    try:
        with hub.bounded(job.repo_id):
            return hub.api.create_commit(
                job.repo_id, operations(job, change), commit_message=title, parent_commit=parent, **target
            )
    except CALL_ERRORS as error:
        error = unwrap(error)
        hub.wait_or_raise(error, job.repo_id, attempt, transient=status_of(error) == 412 or None)
        return None


def message(job: Job) -> str:
    """Title of the commit, by which a later push knows its own work."""
    return f"{COMMIT_PREFIX}{job.release.tag}, m = {job.release.num_visual_tokens}"


def operations(job: Job, change: Difference) -> list:
    """The commit's operations, made anew for every attempt because huggingface_hub changes them."""
    added = [job.files[path] for path in (*change.add, *change.change)]
    return [
        *(CommitOperationAdd(file.path, file.content) for file in added),
        *(CommitOperationDelete(path, is_folder=False) for path in change.delete),
    ]


def verify(hub: Hub, job: Job, change: Difference, revision: str) -> str:
    """Compare a commit's tree with what was sent.

    Raises:
        PushError: naming what differs, as when a file was written to while it was sent.
    """
    files = list_files(hub, job.repo_id, revision)
    wrong = [path for path, file in job.files.items() if not file.equals(files.get(path))]
    wrong += [path for path in change.delete if path in files]
    if wrong:
        raise PushError(
            f"{job.repo_id}: at commit {revision} {', '.join(wrong)} is not what was read here; was it written to "
            "meanwhile? The repository is not tagged and not made public; push again."
        )
    return revision

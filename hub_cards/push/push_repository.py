"""Bring repositories on the Hub to a wanted content, so that no moment of it is a broken state.

Per repository: what is there is compared with what should be there, the difference becomes one commit on top of exactly
the head that was compared, the resulting tree is compared again, then tagged. Repositories are created private and made
public only when every one of them is verified. Running again is how an interrupted run is resumed: what is done already
makes no difference and no commit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fusedvlm.console import progress
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import AGAIN, CALL_ERRORS, Conflict, PushError, status_of, unwrap
from fusedvlm.retry import RetryPolicy

from .difference import Difference, LocalFile, State, difference, holds, list_files, list_tags, look, repo_info

COMMIT_PREFIX = "fusedvlm push: "  # how this tool finds its own last commit


class Pushable(Protocol):
    """What `push` needs to know of a release: its repository, tag, m, and {path in the repository: file or bytes}."""

    repo_id: str
    tag: str
    num_visual_tokens: int
    files: Mapping[str, Path | bytes]


@dataclass(frozen=True)
class Pushed:
    """What became of one repository.

    Args:
        commit: commit that holds the content; None when it is only planned or proposed.
        difference: what the run had to change; None when it could not be compared.
        sizes: bytes of every file.
        pull_request: address of the pull request, if one was asked for.
    """

    repo_id: str
    num_visual_tokens: int
    tag: str
    url: str
    commit: str | None
    difference: Difference | None
    private: bool
    sizes: Mapping[str, int]
    pull_request: str | None = None

    @property
    def sent_bytes(self) -> int:
        """Size of what was (or would be) sent, before the Hub's deduplication."""
        paths = self.sizes if self.difference is None else (*self.difference.add, *self.difference.change)
        return sum(self.sizes[path] for path in paths)


@dataclass
class Job:
    """One repository's way through a run."""

    release: Pushable
    files: dict[str, LocalFile]
    state: State | None = None
    difference: Difference = field(default_factory=Difference)
    commit: str | None = None
    pull_request: str | None = None

    @property
    def repo_id(self) -> str:
        return self.release.repo_id

    def result(self, hub: Hub) -> Pushed:
        """The record of this repository."""
        sizes = {path: file.size for path, file in self.files.items()}
        return Pushed(
            repo_id=self.repo_id,
            num_visual_tokens=self.release.num_visual_tokens,
            tag=self.release.tag,
            url=f"{hub.api.endpoint}/{self.repo_id}",
            commit=self.commit,
            difference=self.difference,
            private=self.state.private if self.state else True,
            sizes=sizes,
            pull_request=self.pull_request,
        )


def prepare(releases: Sequence[Pushable]) -> list[Job]:
    """Read and hash everything that should be on the Hub, without the network.

    Raises:
        ValueError: for two releases of one repository, bad repository names and unreadable files.
    """
    ids = [release.repo_id for release in releases]
    if twice := {repo_id for repo_id in ids if ids.count(repo_id) > 1}:
        raise ValueError(f"{min(twice)}: two variants would go into this repository; their m must differ.")
    for repo_id in ids:
        _check_repo_id(repo_id)
    jobs = []
    for release in progress(releases, "hashing", disable=len(releases) == 1):
        try:
            files = {path: LocalFile.read(path, content) for path, content in sorted(release.files.items())}
        except OSError as error:
            raise ValueError(f"{release.repo_id}: {error.filename} cannot be read ({error.strerror}).") from error
        jobs.append(Job(release, files))
    return jobs


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id}: not a name of a repository: {str(error).splitlines()[0]}") from error
    if repo_id.count("/") != 1 or not repo_id.isascii():
        raise ValueError(f"{repo_id}: name a repository with its owner and in ASCII, like user/model.")


def push(
    releases: Sequence[Pushable],
    hub: Hub | None = None,
    *,
    public: bool = False,
    overwrite: bool = False,
    create_pr: bool = False,
) -> list[Pushed]:
    """Push every release, or propose each as a pull request.

    Args:
        releases: complete and checked; nothing is sent before all of them are read and compared.
        public: make the repositories public once all of them are verified. Public ones stay public in any case.
        overwrite: replace files even where somebody else wrote them.
        create_pr: propose the content; needs no right to write. Nothing is created, tagged or made public then.

    Raises:
        ValueError: for wrong input and `Conflict`s: a tag that is elsewhere, files of somebody else.
        PushError: for what the Hub or the way there refuses. Both name the repository, in one line.
    """
    hub = hub or Hub()
    jobs = prepare(releases)
    user = check_account(hub, jobs, any_namespace=create_pr)
    for job in progress(jobs, "comparing", disable=len(jobs) == 1):
        compare(hub, job)
        if not create_pr:
            refuse_conflicts(hub, job, overwrite)
    with progress(total=len(jobs), description="pushing") as bar:
        for job in jobs:
            bar.set_postfix_str(job.repo_id)
            if create_pr:
                propose(hub, job, user)
            else:
                complete(hub, job, overwrite)
            bar.update()
    for job in jobs if public and not create_pr else ():
        publish(hub, job)
    return [job.result(hub) for job in jobs]


def plan(
    releases: Sequence[Pushable], hub: Hub | None = None, *, overwrite: bool = False
) -> tuple[list[Pushed], str | None]:
    """What `push` would do, without doing it; needs no token for public repositories and no network for the sizes.

    Returns:
        One record per release, and why they could not be compared with the Hub; None when they could.

    Raises:
        ValueError: for wrong input and the conflicts that `push` would stop at.
    """
    hub = hub or Hub(retry_policy=RetryPolicy(attempts=2))
    jobs = prepare(releases)
    try:
        for job in progress(jobs, "comparing", disable=len(jobs) == 1):
            compare(hub, job)
            refuse_conflicts(hub, job, overwrite)
    except Conflict:
        raise
    except PushError as error:
        return plan_offline(releases, hub), str(error)
    for job in jobs:
        job.commit = job.state.head if job.state and not job.difference else None
    return [job.result(hub) for job in jobs], None


def plan_offline(releases: Sequence[Pushable], hub: Hub) -> list[Pushed]:
    """Records of what is here, compared with nothing."""
    return [replace(job.result(hub), difference=None) for job in prepare(releases)]


def check_account(hub: Hub, jobs: Sequence[Job], any_namespace: bool = False) -> str:
    """Name of the account, once it is known to be one that may write (a fine-grained token is found out by writing).

    Raises:
        ValueError, PushError: in one line.
    """
    hub.check_token()
    account = hub.ask("account", hub.api.whoami)
    name, role = account["name"], ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise PushError(f"{jobs[0].repo_id}: the token of {name} may only read; use one with write permission.")
    spaces = {name, *(org["name"] for org in account.get("orgs") or [])}
    for job in jobs:
        owner = job.repo_id.partition("/")[0]
        if not any_namespace and owner not in spaces:
            raise ValueError(
                f"{job.repo_id}: the token belongs to {name}, who may write to {', '.join(sorted(spaces))}; choose one "
                "of these, or propose the content with --create-pr."
            )
    return name


# -- what is there -----------------------------------------------------------------------------------------------------


def compare(hub: Hub, job: Job) -> None:
    """Look at a repository and note what has to change there."""
    job.state = look(hub, job.repo_id)
    job.difference = difference(hub, job.repo_id, job.files, job.state)


def refuse_conflicts(hub: Hub, job: Job, overwrite: bool) -> None:
    """Stop before anything is sent that would contradict a release or destroy somebody else's work.

    A release that is tagged with exactly this content is done, wherever the branch is by now.

    Raises:
        Conflict: naming the repository, the commits or files, and the way out.
    """
    state, tag = job.state, job.release.tag
    if state is None:
        return
    if tag in state.tags:
        if not tag_is_right(hub, job):
            raise tag_conflict(job, state.tags[tag], state.head)
        job.difference = Difference(keep=tuple(job.files))
    touched = {*job.difference.change, *job.difference.delete}
    if touched and not overwrite and (foreign := foreign_files(hub, job.repo_id, state, touched)):
        raise Conflict(
            f"{job.repo_id}: {', '.join(foreign)} at commit {state.head[:8]} was written by somebody else, not by an "
            "earlier push; take the change over or choose another repository, or replace it with --overwrite."
        )


def tag_is_right(hub: Hub, job: Job) -> bool:
    """Whether the commit that the tag is at holds this content."""
    tagged, state = job.state.tags[job.release.tag], job.state
    return holds(job.files, state.files if tagged == state.head else list_files(hub, job.repo_id, tagged))


def tag_conflict(job: Job, tagged: str, head: str) -> Conflict:
    """A release is never moved; the message names both commits and the way out."""
    tag = job.release.tag
    return Conflict(
        f"{job.repo_id}: tag {tag} is at commit {tagged}, which holds other content than this ({_differs(job)}); the "
        f"branch is at {head}. A release is never moved: push this as another one, like --tag {_next(tag)}."
    )


def _differs(job: Job) -> str:
    paths = (*job.difference.change, *job.difference.add, *job.difference.delete)
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "") if paths else "since then"


def _next(tag: str) -> str:
    """A tag to propose: v1.0 -> v1.1."""
    head, dot, last = tag.rpartition(".")
    return f"{head}.{int(last) + 1}" if dot and last.isdigit() else f"{tag}.1"


def foreign_files(hub: Hub, repo_id: str, state: State, paths: set[str]) -> list[str]:
    """Those of `paths` whose present content was not committed by this tool's last push."""
    commits = hub.ask(repo_id, lambda: hub.api.list_repo_commits(repo_id, revision=state.head))
    own = next((commit for commit in commits if commit.title.startswith(COMMIT_PREFIX)), None)
    if own is not None and own.commit_id == state.head:
        before = state.files
    else:
        before = list_files(hub, repo_id, own.commit_id) if own is not None else {}
    return sorted(p for p in paths if p not in before or before[p].identity != state.files[p].identity)


# -- what has to be there ----------------------------------------------------------------------------------------------


def complete(hub: Hub, job: Job, overwrite: bool = False) -> None:
    """Create, commit, verify and tag one repository; each step only when it is not done yet."""
    if job.state is None:
        hub.ask(job.repo_id, lambda: hub.api.create_repo(job.repo_id, private=True, exist_ok=True))
        compare(hub, job)
        if job.state is None:
            raise PushError(f"{job.repo_id}: exists, but this token may not see it; use one of its owner's.", 404)
        refuse_conflicts(hub, job, overwrite)
    planned = job.difference
    job.commit = commit(hub, job, overwrite)
    job.difference = planned
    ensure_tag(hub, job)


def commit(hub: Hub, job: Job, overwrite: bool) -> str:
    """Commit the difference at once; returns the commit whose tree is verified.

    A lost answer and a refused parent mean the same: look again. If the content is there, it went through.
    """
    for attempt in range(1, hub.retry_policy.attempts + 1):
        if not job.difference:
            return job.state.tags.get(job.release.tag, job.state.head)
        made = try_commit(hub, job, job.state.head, attempt)
        if made is not None:
            return verify(hub, job, made.oid)
        compare(hub, job)
        refuse_conflicts(hub, job, overwrite)
    raise AssertionError("the last attempt returns or raises")


def try_commit(hub: Hub, job: Job, parent: str, attempt: int, **target: Any):
    """One attempt at the commit: what the Hub says about it, or None after the wait when it is worth another look."""
    title = message(job)
    try:
        with hub.bounded():
            return hub.api.create_commit(
                job.repo_id, operations(job), commit_message=title, parent_commit=parent, **target
            )
    except CALL_ERRORS as error:
        error = unwrap(error)
        hub.wait_or_raise(error, job.repo_id, attempt, transient=status_of(error) == 412 or None)
        return None


def message(job: Job) -> str:
    """Title of the commit, by which a later push knows its own work."""
    return f"{COMMIT_PREFIX}{job.release.tag}, m = {job.release.num_visual_tokens}"


def operations(job: Job) -> list:
    """The commit's operations, made anew for every attempt because huggingface_hub changes them."""
    added = [job.files[path] for path in (*job.difference.add, *job.difference.change)]
    return [
        *(CommitOperationAdd(file.path, file.content) for file in added),
        *(CommitOperationDelete(path, is_folder=False) for path in job.difference.delete),
    ]


def verify(hub: Hub, job: Job, revision: str) -> str:
    """Compare a commit's tree with what was sent.

    Raises:
        PushError: naming what differs, as when a file was written to while it was sent.
    """
    files = list_files(hub, job.repo_id, revision)
    wrong = [path for path, file in job.files.items() if not file.equals(files.get(path))]
    wrong += [path for path in job.difference.delete if path in files]
    if wrong:
        raise PushError(
            f"{job.repo_id}: at commit {revision} {', '.join(wrong)} is not what was read here; was it written to "
            "meanwhile? The repository is not tagged and not made public; push again."
        )
    return revision


def ensure_tag(hub: Hub, job: Job) -> None:
    """Tag the verified commit, and look whether the tag is there: a gateway may have said yes in the Hub's place.

    A tag is never moved.

    Raises:
        Conflict: naming both commits when the tag is elsewhere.
    """
    tag = job.release.tag
    for _ in range(hub.retry_policy.attempts):
        tagged = job.state.tags.get(tag)
        if tagged is not None:
            if tagged != job.commit and not tag_is_right(hub, job):
                raise tag_conflict(job, tagged, job.commit)
            job.commit = tagged
            return
        try:
            hub.ask(job.repo_id, lambda: hub.api.create_tag(job.repo_id, tag=tag, revision=job.commit))
        except PushError as error:
            if error.status != 409:  # there already, by an attempt whose answer was lost or by somebody else
                raise
        job.state = replace(job.state, tags=list_tags(hub, job.repo_id))
    raise PushError(f"{job.repo_id}: the Hub accepts the tag {tag} and does not show it; {AGAIN}")


def publish(hub: Hub, job: Job) -> None:
    """Make a verified repository public, and look whether it is."""
    for _ in range(hub.retry_policy.attempts):
        if not job.state.private:
            return
        hub.ask(job.repo_id, lambda: hub.api.update_repo_settings(job.repo_id, private=False))
        job.state = replace(job.state, private=repo_info(hub, job.repo_id).private)
    raise PushError(f"{job.repo_id}: the Hub accepts to make it public and does not; {AGAIN}")


def propose(hub: Hub, job: Job, user: str) -> None:
    """Open a pull request with the content, or find and complete the one that is open already.

    Raises:
        PushError: when there is no such repository.
    """
    if job.state is None:
        raise PushError(f"{job.repo_id}: not found; a pull request needs an existing repository.", 404)
    if not job.difference:
        job.commit = job.state.head
        return
    for attempt in range(1, hub.retry_policy.attempts + 1):
        opened = open_request(hub, job, user)
        state = look(hub, job.repo_id, f"refs/pr/{opened.num}") if opened else job.state
        job.difference = difference(hub, job.repo_id, job.files, state)
        if opened and not job.difference:
            job.pull_request = opened.url
            return
        target = {"revision": f"refs/pr/{opened.num}"} if opened else {"create_pr": True}
        made = try_commit(hub, job, state.head, attempt, **target)
        if made is not None:
            job.pull_request = opened.url if opened else made.pr_url
            return


def open_request(hub: Hub, job: Job, user: str):
    """The open pull request of this user with this title, if any."""
    listing = partial(hub.api.get_repo_discussions, job.repo_id, author=user, discussion_type="pull_request")
    found = hub.ask(job.repo_id, lambda: list(listing(discussion_status="open")))
    return next((request for request in found if request.title == message(job)), None)

"""Bring repositories on the Hub to a wanted content, so that no moment of it is a broken state.

Per repository: what is there is compared with what should be there, the difference becomes one commit on top of exactly
the head that was compared, the resulting tree is compared again, then tagged. Repositories are created private and made
public only when every one of them is verified; where readers may be already, the commit is staged on a branch of its
own, and the main branches follow when the whole family is tagged (staging.py). Running again is how an interrupted run
is resumed: what is done already makes no difference and no commit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from huggingface_hub import Discussion

from fusedvlm.console import progress
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import AGAIN, Conflict, PushError
from fusedvlm.retry import RetryPolicy

from .committing import COMMIT_PREFIX, message, try_commit, verify
from .difference import ATTRIBUTES, Difference, State, difference, holds, list_files, list_tags, look, repo_info
from .push_jobs import Job, Pushable, Pushed, prepare
from .staging import branch_of, has_readers, remove_branches, stage, staging_branches


def push(
    releases: Sequence[Pushable],
    hub: Hub | None = None,
    *,
    public: bool = False,
    overwrite: bool = False,
    create_pr: bool = False,
    dependents: Callable[[str], Sequence[Pushable]] | None = None,
) -> list[Pushed]:
    """Push every release, or propose each as a pull request.

    Args:
        releases: complete and checked; nothing is sent before all of them are read and compared.
        public: make the repositories public once all of them are verified. Public ones stay public in any case.
        overwrite: replace files even where somebody else wrote them.
        create_pr: propose the content; needs no right to write. Nothing is created, tagged or made public then.
        dependents: releases that name the commit of the first one, made when that is known and pushed along.

    Raises:
        ValueError: for wrong input and `Conflict`s: a tag that is elsewhere, files of somebody else.
        PushError: for what the Hub or the way there refuses. Both name the repository, in one line.
    """
    hub = hub or Hub()
    jobs = prepare(releases)
    user = check_account(hub, jobs, any_namespace=create_pr)
    if create_pr:
        for job in progress(jobs, "proposing", disable=len(jobs) == 1):
            compare(hub, job)
            propose(hub, job, user)
        return [job.result(hub) for job in jobs]
    release_all(hub, jobs, overwrite)
    if dependents is not None:
        more = prepare(dependents(str(jobs[0].commit)))
        release_all(hub, more, overwrite)
        jobs += more
    follow_all(hub, jobs, overwrite)
    for job in jobs if public else ():
        publish(hub, job)
    return [job.result(hub) for job in jobs]


def release_all(hub: Hub, jobs: Sequence[Job], overwrite: bool) -> None:
    """Bring every content to the Hub and tag it, so far that no reader sees anything new."""
    for job in progress(jobs, "comparing", disable=len(jobs) == 1):
        compare(hub, job)
        refuse_conflicts(hub, job, overwrite)
    with progress(total=len(jobs), description="pushing") as bar:
        for job in jobs:
            bar.set_postfix_str(job.repo_id)
            release(hub, job, overwrite)
            bar.update()


def follow_all(hub: Hub, jobs: Sequence[Job], overwrite: bool) -> None:
    """Let the main branches follow, once every repository has its tag.

    Raises:
        PushError: saying how many repositories show the new release already when one refuses.
    """
    staged = [job for job in jobs if job.staged]
    for done, job in enumerate(staged):
        try:
            follow(hub, job, overwrite)
        except PushError as error:
            tag = job.release.tag
            raise type(error)(
                f"{error} ({done} of {len(staged)} main branches show {tag} so far)", error.status
            ) from error
    for job in jobs:
        if leftover := staging_branches(job.state):
            remove_branches(hub, job.repo_id, leftover)


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
        unchanged = job.state is not None and not job.difference
        job.commit = job.known.tags.get(job.release.tag, job.known.head) if unchanged else None
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
    account = hub.ask("account", hub.api.whoami, lambda answer: isinstance(answer.get("name"), str))
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

    A release that is tagged with exactly this content is done, wherever the branch is by now, unless the branch it was
    staged on is still there, or the main branch was emptied: then that has yet to follow.

    Raises:
        Conflict: naming the repository, the commits or files, and the way out.
    """
    state, tag = job.state, job.release.tag
    if state is None:
        return
    if tag in state.tags:
        if not tag_is_right(hub, job):
            raise tag_conflict(job, state.tags[tag], state.head)
        job.staged = branch_of(tag) in state.branches or not set(state.files) - {ATTRIBUTES}
        if not job.staged:
            job.difference = Difference(keep=tuple(job.files))
    touched = {*job.difference.change, *job.difference.delete}
    if touched and not overwrite and (foreign := foreign_files(hub, job.repo_id, state, touched)):
        raise Conflict(
            f"{job.repo_id}: {', '.join(foreign)} at commit {state.head[:8]} was written by somebody else, not by an "
            "earlier push; take the change over or choose another repository, or replace it with --overwrite."
        )


def tag_is_right(hub: Hub, job: Job) -> bool:
    """Whether the commit that the tag is at holds this content."""
    tagged, state = job.known.tags[job.release.tag], job.known
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
    commits = hub.ask(repo_id, lambda: hub.api.list_repo_commits(repo_id, revision=state.head), bool)
    own = next((commit for commit in commits if commit.title.startswith(COMMIT_PREFIX)), None)
    if own is not None and own.commit_id == state.head:
        before = state.files
    else:
        before = list_files(hub, repo_id, own.commit_id) if own is not None else {}
    return sorted(p for p in paths if p not in before or before[p].identity != state.files[p].identity)


# -- what has to be there ----------------------------------------------------------------------------------------------


def release(hub: Hub, job: Job, overwrite: bool = False) -> None:
    """Create, commit, verify and tag one repository; each step only when it is not done yet.

    Where there are readers the commit is staged, so that a tag that is refused leaves everything as it was.
    """
    if job.state is None:
        hub.ask(job.repo_id, lambda: hub.api.create_repo(job.repo_id, private=True, exist_ok=True))
        compare(hub, job)
        if job.state is None:
            raise PushError(f"{job.repo_id}: exists, but this token may not see it; use one of its owner's.", 404)
        refuse_conflicts(hub, job, overwrite)
    if job.staged:
        job.commit = job.state.tags[job.release.tag]
        return
    planned, staged = job.difference, bool(job.difference) and has_readers(job.state)
    job.commit = stage(hub, job) if staged else commit(hub, job, overwrite)
    job.difference = planned
    ensure_tag(hub, job)
    job.staged = staged


def follow(hub: Hub, job: Job, overwrite: bool = False) -> None:
    """Commit the staged content to the main branch as well."""
    planned, tagged = job.difference, job.commit
    compare(hub, job)
    refuse_conflicts(hub, job, overwrite)
    commit(hub, job, overwrite)
    job.difference, job.commit = planned if planned else job.difference, tagged


def commit(hub: Hub, job: Job, overwrite: bool) -> str:
    """Commit the difference at once; returns the commit whose tree is verified.

    A lost answer and a refused parent mean the same: look again. If the content is there, it went through.
    """
    for attempt in range(1, hub.retry_policy.attempts + 1):
        if not job.difference:
            return job.known.tags.get(job.release.tag, job.known.head)
        made = try_commit(hub, job, job.difference, job.known.head, attempt)
        if made is not None:
            return verify(hub, job, job.difference, made.oid)
        compare(hub, job)
        refuse_conflicts(hub, job, overwrite)
    raise AssertionError("the last attempt returns or raises")


def ensure_tag(hub: Hub, job: Job) -> None:
    """Tag the verified commit, and look whether the tag is there: a gateway may have said yes in the Hub's place.

    A tag is never moved.

    Raises:
        Conflict: naming both commits when the tag is elsewhere.
    """
    tag = job.release.tag
    for _ in range(hub.retry_policy.attempts):
        tagged = job.known.tags.get(tag)
        if tagged is not None:
            if tagged != job.commit and not tag_is_right(hub, job):
                raise tag_conflict(job, tagged, str(job.commit))
            job.commit = tagged
            return
        try:
            hub.ask(job.repo_id, lambda: hub.api.create_tag(job.repo_id, tag=tag, revision=job.commit))
        except PushError as error:
            if error.status != 409:  # there already, by an attempt whose answer was lost or by somebody else
                raise
        job.state = replace(job.known, tags=list_tags(hub, job.repo_id))
    raise PushError(f"{job.repo_id}: the Hub accepts the tag {tag} and does not show it; {AGAIN}")


def publish(hub: Hub, job: Job) -> None:
    """Make a verified repository public, and look whether it is."""
    for _ in range(hub.retry_policy.attempts):
        if not job.known.private:
            return
        hub.ask(job.repo_id, lambda: hub.api.update_repo_settings(job.repo_id, private=False))
        job.state = replace(job.known, private=bool(repo_info(hub, job.repo_id).private))
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
        state = look(hub, job.repo_id, f"refs/pr/{opened.num}") if opened else None
        state = state or job.known
        job.difference = difference(hub, job.repo_id, job.files, state)
        if opened and not job.difference:
            job.pull_request = opened.url
            return
        target = {"revision": f"refs/pr/{opened.num}"} if opened else {"create_pr": True}
        made = try_commit(hub, job, job.difference, state.head, attempt, **target)
        if made is not None:
            job.pull_request = opened.url if opened else made.pr_url
            return


def open_request(hub: Hub, job: Job, user: str) -> Discussion | None:
    """The open pull request of this user with this title, if any."""
    listing = partial(hub.api.get_repo_discussions, job.repo_id, author=user, discussion_type="pull_request")
    found = hub.ask(job.repo_id, lambda: list(listing(discussion_status="open")))
    return next((request for request in found if request.title == message(job)), None)

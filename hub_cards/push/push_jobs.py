"""One repository's way through a push: what should be there, what was found, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from huggingface_hub.utils import HFValidationError, validate_repo_id

from fusedvlm.console import progress
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import AGAIN, PushError

from .difference import Difference, LocalFile, State


class Pushable(Protocol):
    """What `push` needs to know of a release: its repository, tag, m, and {path in the repository: file or bytes}."""

    @property
    def repo_id(self) -> str: ...
    @property
    def tag(self) -> str: ...
    @property
    def num_visual_tokens(self) -> int: ...
    @property
    def files(self) -> Mapping[str, Path | bytes]: ...


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
    staged: bool = False  # tagged, but not on the main branch yet
    pull_request: str | None = None

    @property
    def repo_id(self) -> str:
        return self.release.repo_id

    @property
    def known(self) -> State:
        """The repository as it was last seen. Raises `PushError` when it was not there."""
        if self.state is None:
            raise PushError(f"{self.repo_id}: not found; was it deleted or renamed in the meantime? {AGAIN}", 404)
        return self.state

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

"""What a repository on the Hub holds against what it should hold: hashes of both sides, and the difference."""

import hashlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import GitRefs, ModelInfo, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from fusedvlm.console import say
from fusedvlm.files import read_json
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import AGAIN, Conflict, OddAnswer, PushError, one_line
from fusedvlm.model_source import HUB_ID

MANIFEST = "checksums.json"
ATTRIBUTES = ".gitattributes"  # the Hub's own
CHUNK = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A file as it should be, with both hashes by which the Hub may know it.

    Args:
        sha1: git's blob id. sha256: of the content.
    """

    path: str
    content: Path | bytes
    size: int
    sha1: str
    sha256: str

    @classmethod
    def read(cls, path: str, content: Path | bytes) -> "LocalFile":
        """Hash a file in one pass."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha1, sha256 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), hashlib.sha256()
        for chunk in _chunks(content):
            sha1.update(chunk)
            sha256.update(chunk)
        return cls(path, content, size, sha1.hexdigest(), sha256.hexdigest())

    def equals(self, remote: "RemoteFile | None") -> bool:
        """Whether the Hub has exactly this content."""
        if remote is None or remote.size != self.size:
            return False
        return remote.sha256 == self.sha256 if remote.sha256 else remote.sha1 == self.sha1


def _chunks(content: Path | bytes) -> Iterable[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


@dataclass(frozen=True)
class RemoteFile:
    """A file as it is; `sha256` for those that are kept outside git, whose `sha1` is their pointer's."""

    size: int
    sha1: str
    sha256: str | None

    @property
    def identity(self) -> str:
        return self.sha256 or self.sha1


@dataclass(frozen=True)
class State:
    """A repository at one commit."""

    head: str
    private: bool
    files: Mapping[str, RemoteFile]
    tags: Mapping[str, str]
    branches: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Difference:
    """Paths by what a commit has to do with them."""

    add: tuple[str, ...] = ()
    change: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.change or self.delete)

    def __str__(self) -> str:
        counts = {"added": self.add, "changed": self.change, "deleted": self.delete}
        return ", ".join(f"{len(paths)} {what}" for what, paths in counts.items() if paths) or "nothing to change"


def look(hub: Hub, repo_id: str, revision: str | None = None) -> State | None:
    """What a repository holds; None when there is no such repository for this token."""
    try:
        info = repo_info(hub, repo_id, revision)
    except PushError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise
    expect(isinstance(info.id, str) and HUB_ID.fullmatch(info.id) is not None, repo_id, "its name", info.id)
    if info.id.lower() != repo_id.lower():
        raise Conflict(f"{repo_id}: was renamed to {info.id}; push there, or choose another name.")
    expect(is_hash(info.sha, 40), repo_id, "its commit", info.sha)
    expect(isinstance(info.private, bool), repo_id, "whether it is private", info.private)
    refs = list_refs(hub, repo_id)
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    branches = frozenset(branch.name for branch in refs.branches)
    head = str(info.sha)
    return State(head, bool(info.private), list_files(hub, repo_id, head), tags, branches)


def expect(is_right: bool, repo_id: str, what: str, said: object) -> None:
    """Refuse an answer whose parts are not of the kind the Hub gives: no comparison with it would mean anything.

    Raises:
        PushError: naming the repository and what the answer says.
    """
    if not is_right:
        raise PushError(
            f"{repo_id}: {what} is {one_line(repr(said))[:60]} by the answer; something between here and the "
            f"Hub answers in its place; {AGAIN}"
        )


def is_hash(value: object, length: int) -> bool:
    """Whether a value is a hash in hex of that many characters."""
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{length}}}", value) is not None


def repo_info(hub: Hub, repo_id: str, revision: str | None = None) -> ModelInfo:
    """The Hub's `ModelInfo`."""
    timeout = hub.retry_policy.timeout
    return hub.ask(repo_id, lambda: hub.api.model_info(repo_id, revision=revision, timeout=timeout))


def list_refs(hub: Hub, repo_id: str) -> GitRefs:
    """The Hub's `GitRefs`: branches and tags."""
    refs = hub.ask(repo_id, lambda: hub.api.list_repo_refs(repo_id))
    for tag in refs.tags:
        name, commit = tag.name, tag.target_commit
        expect(isinstance(name, str) and is_hash(commit, 40), repo_id, f"tag {one_line(repr(name))[:60]}", commit)
    for branch in refs.branches:
        expect(isinstance(branch.name, str), repo_id, "the name of a branch", branch.name)
    return refs


def list_tags(hub: Hub, repo_id: str) -> dict[str, str]:
    """{tag: commit}."""
    return {tag.name: tag.target_commit for tag in list_refs(hub, repo_id).tags}


def list_branches(hub: Hub, repo_id: str) -> set[str]:
    """Names of all branches."""
    return {branch.name for branch in list_refs(hub, repo_id).branches}


def list_files(hub: Hub, repo_id: str, revision: str) -> dict[str, RemoteFile]:
    """All files of a commit."""
    rows = hub.ask(repo_id, lambda: _tree(hub, repo_id, revision))
    files: dict[str, RemoteFile] = {}
    row: Any
    for row in rows:
        if not hasattr(row, "blob_id"):
            continue
        expect(isinstance(row.path, str) and row.path != "", repo_id, "the path of a file", row.path)
        file = RemoteFile(row.size, row.blob_id, row.lfs.sha256 if row.lfs else None)
        is_size = isinstance(file.size, int) and not isinstance(file.size, bool) and file.size >= 0
        is_known = is_hash(file.sha1, 40) and (file.sha256 is None or is_hash(file.sha256, 64))
        expect(is_size and is_known, repo_id, f"file {one_line(repr(row.path))[:60]}", (file.size, file.identity))
        files[row.path] = file
    return files


def _tree(hub: Hub, repo_id: str, revision: str) -> list:
    """Rows of a commit's tree. One without any is believed when the repository itself lists no file either.

    The Hub puts a file into every new repository, so an empty list is mostly somebody else's answer; only its owners
    can have emptied it.
    """
    rows = list(hub.api.list_repo_tree(repo_id, recursive=True, revision=revision))
    timeout = hub.retry_policy.timeout
    if not rows and hub.api.model_info(repo_id, revision=revision, timeout=timeout).siblings != []:
        raise OddAnswer(ValueError("no files, in a repository that has some"))
    return rows


def difference(hub: Hub, repo_id: str, files: Mapping[str, LocalFile], state: State | None) -> Difference:
    """What one commit has to do so that a repository holds `files`.

    Only files that this tool wrote before and has no more are deleted.
    """
    if state is None:
        return Difference(add=tuple(files))
    present = [path for path in files if path in state.files]
    stale = set(state.files) - set(files) - {ATTRIBUTES}
    owned = written_before(hub, repo_id, state) if stale else set()
    return Difference(
        add=tuple(path for path in files if path not in state.files),
        change=tuple(path for path in present if not files[path].equals(state.files[path])),
        delete=tuple(sorted(stale & owned)),
        keep=tuple(path for path in present if files[path].equals(state.files[path])),
    )


def holds(files: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile]) -> bool:
    """Whether a tree has every file as it should be."""
    return all(file.equals(remote.get(path)) for path, file in files.items())


def written_before(hub: Hub, repo_id: str, state: State) -> set[str]:
    """Files that an earlier push wrote, from the list of checksums it left there."""
    if MANIFEST not in state.files:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        download = partial(hf_hub_download, repo_id, MANIFEST, revision=state.head, local_dir=folder)
        path = hub.ask(repo_id, partial(download, endpoint=hub.api.endpoint, token=hub.token or False))
        try:
            listed = read_json(path, None)
        except ValueError:
            listed = None
    listed = listed.get("files", listed) if isinstance(listed, dict) else None
    if not isinstance(listed, dict):
        say(f"{repo_id}: {MANIFEST} there is damaged, so no file of an earlier push is deleted")
        return set()
    return {MANIFEST, *listed}

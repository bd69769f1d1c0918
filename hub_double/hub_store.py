"""What the small Hub keeps: users, repositories with git-like commits, large files, collections.

Blobs, pointers and commits are addressed as the Hub addresses them (git sha1, sha256 of large files), because clients
compare those to decide what to send.
"""

import hashlib
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

from .xet_shards import xet_hashes

ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.onnx", "*.zip", "*.gz")
).encode()
LARGE = 10_000_000  # text of this size goes to large-file storage whatever its name


def git_sha1(data: bytes, kind: str = "blob") -> str:
    """Git's object id."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def now() -> str:
    """The time as the Hub writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


@dataclass(frozen=True)
class Blob:
    """One version of a file: its bytes, or for a large file its sha256."""

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> "Blob":
        """A file that git keeps."""
        return cls(len(data), git_sha1(data), data)

    @classmethod
    def large(cls, sha256: str, size: int) -> "Blob":
        """A file of which git keeps a pointer."""
        return cls(size, git_sha1(_pointer(sha256, size)), None, sha256)

    @property
    def pointer_size(self) -> int:
        """Bytes of a large file's pointer."""
        return len(_pointer(self.sha256 or "", self.size))

    @property
    def etag(self) -> str:
        """What clients compare to see whether they have it."""
        return self.sha256 or self.oid


@dataclass
class Commit:
    """A whole tree and how it came to be."""

    oid: str
    title: str
    message: str
    author: str
    parent: str | None
    files: dict[str, Blob]
    date: str


@dataclass
class Repo:
    """A model repository."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    # (what happened, private at that moment, head) of every change that somebody could see
    history: list[tuple[str, bool, str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)  # pull requests; each has a branch refs/pr/{num}

    def resolve(self, revision: str) -> Commit | None:
        """Branch, tag, commit or abbreviated commit."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid in self.commits:
            return self.commits[oid]
        if len(oid) >= 7:
            return next((commit for full, commit in self.commits.items() if full.startswith(oid)), None)
        return None

    @property
    def head(self) -> Commit:
        """Last commit of the main branch."""
        return self.commits[self.branches["main"]]

    def commit(self, branch: str, title: str, message: str, author: str, files: dict[str, Blob]) -> Commit:
        """Add a commit to a branch."""
        parent = self.branches.get(branch)
        seed = repr((self.id, parent, title, len(self.commits), sorted((p, b.oid) for p, b in files.items())))
        oid = git_sha1(seed.encode(), "commit")
        self.commits[oid] = Commit(oid, title, message, author, parent, dict(files), now())
        self.branches[branch] = oid
        self.history.append(("commit", self.private, oid))
        return self.commits[oid]

    def propose(self, title: str, author: str, parent: str) -> int:
        """Open a pull request whose branch starts at `parent`; returns its number."""
        number = len(self.requests) + 1
        self.branches[f"refs/pr/{number}"] = parent
        row = {"num": number, "title": title, "author": author, "createdAt": now(), "status": "open"}
        self.requests.append({**row, "isPullRequest": True})
        return number

    def ancestry(self, oid: str) -> list[Commit]:
        """A commit and everything before it, newest first."""
        found, following = [], self.commits.get(oid)
        while following is not None:
            found.append(following)
            following = self.commits[following.parent] if following.parent else None
        return found

    def is_large(self, path: str, size: int) -> bool:
        """Whether the Hub would keep this file outside git."""
        attributes = self.head.files.get(".gitattributes")
        lines = attributes.data.decode(errors="replace").splitlines() if attributes and attributes.data else []
        patterns = [line.split()[0] for line in lines if line.strip()]
        return size > LARGE or any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)


class Store:
    """Everything the Hub remembers.

    Args:
        xet_folder: where Xet clients put large files by themselves.
    """

    def __init__(self, xet_folder: Path) -> None:
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}  # what arrived through LFS
        self.parts: dict[str, dict[int, bytes]] = {}  # {upload: {number: bytes}}
        self.xet_folder = xet_folder
        self.tokens: dict[str, dict[str, Any]] = {}

    def new_upload(self) -> str:
        """Name of a new upload in parts."""
        name = uuid4().hex
        self.parts[name] = {}
        return name

    def user(self, token: str | None) -> dict[str, Any] | None:
        """Whose token it is."""
        return self.tokens.get(token or "")

    def can_read(self, repo: Repo, user: dict[str, Any] | None) -> bool:
        """Whether a user, or somebody without a token, may see a repository."""
        return not repo.private or (user is not None and self.owns(user, repo.id.split("/")[0]))

    @staticmethod
    def owns(user: dict[str, Any], namespace: str) -> bool:
        """Whether a namespace is the user's or that of one of their organizations."""
        return bool(namespace == user["name"] or namespace in user["orgs"])

    def create(self, repo_id: str, private: bool, author: str) -> Repo:
        """A new repository with the first commit the Hub makes."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", "initial commit", "", author, {".gitattributes": Blob.regular(ATTRIBUTES)})
        return repo

    def has_large(self, sha256: str) -> bool:
        """Whether a large file has arrived, either way."""
        return sha256 in self.large or sha256 in self.xet_hashes()

    def xet_hashes(self) -> dict[str, str]:
        """sha256 to Xet hash of every file that arrived through Xet."""
        return xet_hashes(self.xet_folder)

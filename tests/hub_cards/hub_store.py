"""What the Hub double keeps: repositories with git-like commits, large files, collections, card validation.

Blobs, pointers and commits are addressed as the Hub addresses them (git sha1, sha256 of large files), because clients
compare those to decide what to send.
"""

import hashlib
import re
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml

ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.onnx", "*.zip", "*.gz")
).encode()
LARGE = 10_000_000  # text of this size goes to large-file storage whatever its name
LICENSES = {
    "apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "llama4", "gemma", "unknown", "other",
}  # fmt: skip
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def git_sha1(data: bytes, kind: str = "blob") -> str:
    """Git's object id."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """One version of a file: its bytes, or for a large file its sha256."""

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> "Blob":
        return cls(len(data), git_sha1(data), data)

    @classmethod
    def large(cls, sha256: str, size: int) -> "Blob":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(size, git_sha1(pointer), None, sha256)

    @property
    def pointer_size(self) -> int:
        return len(f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n")

    @property
    def etag(self) -> str:
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
    requests: list[dict] = field(default_factory=list)  # pull requests; each has a branch refs/pr/{num}

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
        return self.commits[self.branches["main"]]

    def commit(self, branch: str, title: str, message: str, author: str, files: dict[str, Blob]) -> Commit:
        """Add a commit to a branch."""
        parent = self.branches.get(branch)
        seed = repr((self.id, parent, title, len(self.commits), sorted((p, b.oid) for p, b in files.items())))
        oid = git_sha1(seed.encode(), "commit")
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.commits[oid] = Commit(oid, title, message, author, parent, dict(files), date)
        self.branches[branch] = oid
        self.history.append(("commit", self.private, oid))
        return self.commits[oid]

    def propose(self, title: str, author: str, parent: str) -> int:
        """Open a pull request whose branch starts at `parent`; returns its number."""
        number = len(self.requests) + 1
        self.branches[f"refs/pr/{number}"] = parent
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        row = {"num": number, "title": title, "author": author, "createdAt": date, "status": "open"}
        self.requests.append({**row, "isPullRequest": True})
        return number

    def ancestry(self, oid: str) -> list[Commit]:
        """A commit and everything before it, newest first."""
        found = []
        while oid:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found

    def is_large(self, path: str, size: int) -> bool:
        """Whether the Hub would keep this file outside git."""
        attributes = self.head.files.get(".gitattributes")
        lines = attributes.data.decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if line]
        return size > LARGE or any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)


class Store:
    """Everything the double remembers."""

    def __init__(self, xet_folder: Path):
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.large: dict[str, bytes] = {}  # what arrived through LFS
        self.parts: dict[str, dict[int, bytes]] = {}  # {upload: {number: bytes}}
        self.xet_folder = xet_folder
        self.tokens: dict[str, dict] = {}

    def new_upload(self) -> str:
        """Name of a new upload in parts."""
        name = str(len(self.parts))
        self.parts[name] = {}
        return name

    def user(self, token: str | None) -> dict | None:
        return self.tokens.get(token or "")

    def can_read(self, repo: Repo, user: dict | None) -> bool:
        return not repo.private or (user is not None and self.owns(user, repo.id.split("/")[0]))

    @staticmethod
    def owns(user: dict, namespace: str) -> bool:
        return namespace == user["name"] or namespace in user["orgs"]

    def create(self, repo_id: str, private: bool, author: str) -> Repo:
        """A new repository with the first commit the Hub makes."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", "initial commit", "", author, {".gitattributes": Blob.regular(ATTRIBUTES)})
        return repo

    def has_large(self, sha256: str) -> bool:
        return sha256 in self.large or sha256 in self.xet_hashes()

    def xet_hashes(self) -> dict[str, str]:
        """sha256 to Xet hash of every file in the local content store, read from its shards.

        A shard is a 48-byte header, then records of 48 bytes: per file a header (hash 32, flags u32, segments u32), its
        segments, as many verification records if bit 31 of the flags is set, one record that starts with the sha256 if
        bit 30 is; 32 bytes 0xff end the list. Hashes are four little-endian u64.
        """
        found = {}
        for shard in self.xet_folder.glob("xet/xorbs/shards/*.mdb"):
            data, position = shard.read_bytes(), 48
            while position + 48 <= len(data) and data[position : position + 32] != b"\xff" * 32:
                file_hash = data[position : position + 32]
                flags = int.from_bytes(data[position + 32 : position + 36], "little")
                segments = int.from_bytes(data[position + 36 : position + 40], "little")
                position += 48 * (1 + segments * (2 if flags >> 31 & 1 else 1))
                if flags >> 30 & 1:
                    found[_hex(data[position : position + 32])] = _hex(file_hash)
                    position += 48
        return found

    def bytes_of(self, blob: Blob) -> bytes | None:
        """Content of a file; None when only the Xet client can read it."""
        return blob.data if blob.data is not None else self.large.get(blob.sha256)


def _hex(raw: bytes) -> str:
    return "".join(f"{int.from_bytes(raw[start : start + 8], 'little'):016x}" for start in range(0, 32, 8))


def validate_card(content: str) -> list[str]:
    """What the Hub finds wrong with a card's metadata."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["The metadata must be a mapping"]
    errors = []
    licenses = data.get("license", [])
    for license in licenses if isinstance(licenses, list) else [licenses]:
        if license not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for number, value in enumerate(values if isinstance(values, list) else [values]):
            if not isinstance(value, str) or not ID.fullmatch(value):
                errors.append(f'"{key}[{number}]" with value "{value}" is not valid')
    return errors + _validate_model_index(data.get("model-index"))


def _validate_model_index(index) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for model in index:
        for result in model.get("results", []) if isinstance(model, dict) else [{}]:
            dataset, metrics = result.get("dataset") or {}, result.get("metrics") or []
            if not (result.get("task") or {}).get("type"):
                errors.append('"model-index[].results[].task.type" is required')
            if not dataset.get("type") or not dataset.get("name"):
                errors.append('"model-index[].results[].dataset" needs type and name')
            if not metrics or any("type" not in metric or "value" not in metric for metric in metrics):
                errors.append('"model-index[].results[].metrics[]" needs type and value')
    return errors

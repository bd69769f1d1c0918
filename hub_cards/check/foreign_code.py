"""Is the code of a repository what this package writes, now or in a released version? Anything else is foreign.

Files are compared by the sha256 of their bytes, with Windows line ends as the only difference that is let pass: a
comment can change what a file means (`# coding: ...`), so equal syntax trees would not be enough.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import fusedvlm
from fusedvlm.hub_code import code_files

RELEASED = Path(__file__).parent / "released_code.json"
LONGEST_DIFF = 400  # lines


@dataclass(frozen=True)
class ForeignFile:
    """One file of code that no known version of this package writes there.

    Args:
        name: path in the repository.
        message: what it is instead.
        diff: unified diff from this package's file of that name, made printable; empty when nothing can be shown.
    """

    name: str
    message: str
    diff: str = ""


def code_digest(data: bytes) -> str:
    """sha256 of a source file, the same with Unix and Windows line ends."""
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()


def own_code() -> dict[str, str]:
    """{file: digest} of the code that travels with variants of this version."""
    return {path.name: code_digest(path.read_bytes()) for path in code_files()}


@lru_cache(maxsize=1)
def known_code() -> dict[str, dict[str, str]]:
    """{version: {file: digest}} of every released version and of this one."""
    released = json.loads(RELEASED.read_text(encoding="utf-8"))["versions"]
    return {**released, fusedvlm.__version__: own_code()}


def is_code(name: str) -> bool:
    """Whether Python would import a file of this name."""
    return Path(name).suffix.lower() in {".py", ".pyw", ".pyi"}


def code_version(digests: Mapping[str, str], claimed: str | None = None) -> str:
    """The known version that most of these files are of; `claimed` wins a draw, then this package's own."""
    known = known_code()

    def rank(version: str) -> tuple[int, bool, bool]:
        same = sum(known[version].get(name) == digest for name, digest in digests.items())
        return same, version == claimed, version == fusedvlm.__version__

    return max(known, key=rank)


def foreign_code(files: Mapping[str, Path], claimed: str | None = None) -> Iterator[ForeignFile]:
    """Code that is not what one known version writes, file by file.

    Args:
        files: {path in the repository: file}.
        claimed: version that the repository's facts name.
    """
    digests = {name: code_digest(path.read_bytes()) for name, path in files.items() if is_code(name)}
    version = code_version(digests, claimed)
    expected = known_code()[version]
    for name in sorted({*digests, *expected}):
        if name not in digests:
            yield ForeignFile(name, f"missing, though fusedvlm {version} writes it")
        elif digests[name] != expected.get(name):
            yield _describe(name, digests[name], files[name], version)


def _describe(name: str, digest: str, path: Path, version: str) -> ForeignFile:
    others = [other for other, code in known_code().items() if code.get(name) == digest]
    if others:
        return ForeignFile(name, f"is the file of fusedvlm {others[0]}, the rest of the code is of {version}")
    own = {file.name: file for file in code_files()}.get(name)
    lines = diff_lines(own, path)
    added = sum(line.startswith("+") for line in lines[2:])
    removed = sum(line.startswith("-") for line in lines[2:])
    what = "no version of fusedvlm has a file of this name" if own is None else f"not what fusedvlm {version} writes"
    return ForeignFile(name, f"foreign code, {what} (+{added} -{removed} lines)", "\n".join(lines[:LONGEST_DIFF]))


def diff_lines(own: Path | None, other: Path) -> list[str]:
    """Unified diff between this package's file (or nothing) and another, with everything unprintable escaped."""
    before = [] if own is None else own.read_text(encoding="utf-8").splitlines()
    after = other.read_bytes().decode("utf-8", errors="replace").split("\n")
    diff = difflib.unified_diff(before, after, "fusedvlm", "repository", lineterm="", n=2)
    return [printable(line) for line in diff]


def printable(text: str) -> str:
    """Text that moves no cursor and hides nothing: control, direction and other invisible characters as escapes."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)

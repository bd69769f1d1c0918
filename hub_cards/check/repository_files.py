"""The files of a folder as a repository: what is one of it, what only looks like one, and what is too large to be."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

# What `git clone` and `hf download --local-dir` leave beside the files.
BESIDE = (".git", ".cache/huggingface")
MOST_FILES = 1000
MB = 1_000_000
# Pieces of text by the hundred thousand; only these may be large, and only their entries may look like anything.
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"}
LARGEST_VOCABULARY = 64 * MB
LARGEST_BY_SUFFIX = {
    ".json": 5 * MB, ".yaml": MB // 10, ".py": MB, ".md": MB // 2, ".txt": MB, ".jinja": MB // 2, ".png": 5 * MB,
    ".model": LARGEST_VOCABULARY,
}  # fmt: skip
LARGEST_OTHER = MB


def folder_files(folder: Path) -> dict[str, Path]:
    """{path in the repository: file}, sorted; only what is a file, wherever a link of that name leads."""
    return {name: path for name, path in _walk(folder) if path.is_file()}


def misplaced(folder: Path) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of links that lead out of the folder or nowhere, of devices and pipes, and of names that
    other systems cannot tell apart or a terminal cannot show."""
    names: dict[str, str] = {}
    for number, (name, path) in enumerate(_walk(folder), start=1):
        if number > MOST_FILES:
            yield ".", f"holds more than {MOST_FILES} files, which no variant's repository does"
            return
        if not name.isprintable():
            yield name, "has a name with characters that cannot be shown"
        if (twin := names.setdefault(name.casefold(), name)) != name:
            yield name, f"differs from {twin} in capitals only"
        if what := _misplaced(folder, path):
            yield name, what


def _misplaced(folder: Path, path: Path) -> str | None:
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.exists():
            return "is a link to something that is not there"
        if target.is_dir():
            return "is a link to a folder"
        if not target.is_relative_to(folder.resolve()) and not _is_cached_blob(folder, target):
            return "is a link out of the repository"
    return None if path.is_file() else "is neither a file nor a folder"


def _is_cached_blob(folder: Path, target: Path) -> bool:
    """Whether a link is one of huggingface_hub's cache: snapshots/<commit>/name -> blobs/<hash>."""
    cache = folder.resolve().parent.parent
    return folder.resolve().parent.name == "snapshots" and target.parent == cache / "blobs"


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything in a folder that is not a real folder, sorted, as (path in the repository, path)."""
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder).as_posix()
        prefix = "" if inside == "." else inside + "/"
        linked = [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in linked and prefix + name not in BESIDE)
        yield from ((prefix + name, Path(place, name)) for name in sorted([*names, *linked]))


def oversized(files: Mapping[str, Path]) -> dict[str, str]:
    """{path: what is wrong} of files too large for their kind, so that nobody reads them. Weights have no limit."""
    found = {}
    for name, path in files.items():
        size, most = path.stat().st_size, largest(name)
        if most is not None and size > most:
            found[name] = f"has {size:,} bytes; a file of its kind has at most {most:,}"
    return found


def largest(name: str) -> int | None:
    """Bytes that a file of this name may have; None for weights."""
    path = PurePosixPath(name)
    if path.suffix == ".safetensors":
        return None
    if path.name in VOCABULARIES:
        return LARGEST_VOCABULARY
    return LARGEST_BY_SUFFIX.get(path.suffix, LARGEST_OTHER)

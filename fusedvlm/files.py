"""Files that are whole or not there, their digests, and strict readers of JSON, YAML and CSV.

A key that is stated twice is a mistake everywhere: plain readers would keep the last one without a word.
"""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What writers of weights say in place of that.
RIDDLES = ("No space left", "file write failed", "unexpected pos", "PytorchStreamWriter", "I/O error", "quota exceeded")


@contextmanager
def open_atomically(path: str | Path) -> Iterator[IO[str]]:
    """A text file to write, which appears under its name only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old text or the new one, never half of it."""
    with open_atomically(path) as file:
        file.write(text)


def write_json(path: str | Path, document: Any, indent: int | None = 2) -> None:
    """Write one JSON document, whole or not at all; NaN and infinity are refused because JSON has no such numbers."""
    write_atomically(path, json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: str | Path) -> None:
    """Have the system put a file's content, or a folder's entries, on the disk before anything else happens.

    Windows syncs no folders (it journals their entries itself), and files only for who may write them.
    """
    is_windows = os.name == "nt"
    if is_windows and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A file under another name: a link, and a copy where links are not allowed (Windows without developer mode)."""
    try:
        os.symlink(Path(source).resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON document.

    Raises:
        ValueError: one line that begins with `where`, for text that is not JSON or states a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise ValueError(f"{where}: {twice!r} is stated twice.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: damaged, not JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"{where}: damaged, JSON nested too deeply.") from None


def read_json(path: str | Path, kind: type | None = dict) -> Any:
    """A JSON file.

    Args:
        kind: what the document must be, `dict` or `list`; None for anything.

    Raises:
        ValueError: one line that names the file, for one that is missing, unreadable, not JSON or of another kind.
    """
    document = parse_json(_read_bytes(path), str(path))
    if kind is not None and not isinstance(document, kind):
        wanted = "a list" if kind is list else "keys and values"
        raise ValueError(f"{path}: must hold {wanted}, found {type(document).__name__}.")
    return document


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise ValueError(f"{node.start_mark.name}: {twice!r} is stated twice.")
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-5 as text; every other reader of numbers takes it for one.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """A YAML document, None when it is empty.

    Raises:
        ValueError: one line that begins with `where`, for text that is not YAML or states a key twice.
    """
    loader = None
    try:
        loader = _UniqueKeyLoader(text)
        loader.name = where
        return loader.get_single_data()
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        if str(error).startswith(f"{where}: "):
            raise  # a key that is stated twice
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: str | Path, kind: type | None = dict) -> Any:
    """A YAML file.

    Args:
        kind: `dict` for keys and values, of which an empty file has none; None for anything.

    Raises:
        ValueError: one line that names the file, for one that is missing, unreadable, not YAML or of another kind.
    """
    document = parse_yaml(_read_bytes(path), str(path))
    if kind is dict and document is None:
        return {}
    if kind is not None and not isinstance(document, kind):
        raise ValueError(f"{path}: must hold keys and values (a YAML mapping), found {type(document).__name__}.")
    return document


def read_table(
    path: str | Path, required: Sequence[str], same: Mapping[str, str] | None = None
) -> list[tuple[str, dict[str, str]]]:
    """Rows of a CSV file with a header; lines that are empty or begin with "#" do not count.

    Args:
        path: of the file.
        required: columns that must be there; others may.
        same: {other spelling of a column: its name}.

    Returns:
        (`row N` with the line number in the file, cells as stripped text by column) of each row.

    Raises:
        ValueError: one line that names the file and the row, for a missing or repeated column, and rows with too few or
            too many cells.
    """
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"]
    if not lines:
        raise ValueError(f"{path}: empty; it needs a header with the columns {', '.join(required)}.")
    header = check_columns(_cells(lines[0][1]), required, f"{path}, row {lines[0][0]}", same)
    rows = []
    for number, line in lines[1:]:
        cells = _cells(line)
        if len(cells) != len(header):
            raise ValueError(f"{path}, row {number}: {len(cells)} cells for {len(header)} columns ({line!r:.80}).")
        rows.append((f"row {number}", dict(zip(header, cells, strict=True))))
    return rows


def check_columns(
    header: Iterable[str], required: Sequence[str], where: str, same: Mapping[str, str] | None = None
) -> list[str]:
    """The columns under their own names. Raises `ValueError` for one that is missing or there twice."""
    names = [(same or {}).get(name, name) for name in header]
    if missing := [name for name in required if name not in names]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; there are {', '.join(names)}.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where}: column {', '.join(repeated)} appears twice.")
    return names


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line]))]


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None


@contextmanager
def saying_when_full(folder: Path, what: str) -> Iterator[None]:
    """Turn what writers say on a full disk into one line.

    Args:
        folder: that is written to.
        what: what is written, and what that means: the end of a sentence.

    Raises:
        OSError: with the free space, in place of any error that a full disk explains.
    """
    try:
        yield
    except Exception as error:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        is_full = getattr(error, "errno", None) in FULL or any(riddle in str(error) for riddle in RIDDLES)
        if not is_full and free >= 1 << 20:
            raise
        raise OSError(
            f"The disk is full: {free / 1e6:.0f} MB are free in {place} or its quota is used up. {what}"
        ) from error

"""Rows of JSON and JSON Lines files one at a time: a 1 GB array is never in memory whole, and bad rows are named."""

import codecs
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import ijson

from fusedvlm.wording import end_of, fit, shown

CHUNK = 1 << 20  # bytes read at a time


def read_json_rows(path: str) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON array (`[row, row, ...]`) or of JSON Lines, numbered from 1.

    A line of JSON Lines that is not JSON comes as the `ValueError` that says so, and the next ones follow.

    Args:
        path: file, plain or compressed (.gz, .bz2, .xz, .zip with one file), or URL that fsspec can open (`hf://`).

    Raises:
        ValueError: naming the file, and the row of an array that is not JSON; for a file without rows, one that is not
            UTF-8, a damaged archive.
    """
    address = _zip_member(path) if path.endswith(".zip") else path
    try:
        with fsspec.open(address, "rb", compression="infer") as raw:
            file = _Joined(raw)
            if not file.start:
                raise ValueError(f"{end_of(path)}: no rows; the file is empty.")
            yield from (_array_rows if file.start.startswith(b"[") else _line_rows)(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{end_of(path)}: not text in UTF-8 ({error.reason} at byte {error.start}).") from None
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{end_of(path)}: a damaged archive ({error}); fetch it again.") from None


class _Joined:
    """A binary file from its first byte that is neither a byte order mark nor white space."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.start = self._block().removeprefix(codecs.BOM_UTF8).lstrip()
        while not self.start and (block := self._block()):
            self.start = block.lstrip()

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`. Raises `UnicodeDecodeError` for bytes that are not UTF-8."""
        taken = (self.start if size < 0 else self.start[:size]) or self.file.read(size)
        self.start = self.start[len(taken) :]
        self.decoder.decode(taken, final=not taken)
        return taken

    def _block(self) -> bytes:
        return self.file.read(CHUNK)


def _zip_member(path: str) -> str:
    """Address of the one file in a zip: fsspec alone would take the first and be silent about the others."""
    try:
        with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{end_of(path)}: not a zip file ({error}); fetch it again.") from None
    names = [name for name in names if name.endswith((".json", ".jsonl"))] or names
    if len(names) != 1:
        some = fit(", ".join(names[:5]), 90)
        raise ValueError(f"{end_of(path)}: holds {len(names)} files ({some}); unpack it and name one of them.")
    return f"zip://{names[0]}::{path}"


def _line_rows(file: _Joined, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield number, _read_line(line, number)


def _lines(file: _Joined) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")  # not splitlines(): JSON strings may hold other line breaks
        yield from lines
    yield rest


def _read_line(line: bytes, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        hint = " (one JSON document must be an array of rows; JSON Lines has one row per line)" if number == 1 else ""
        return ValueError(f"not JSON: {error}{hint}.")
    except ValueError as error:
        return error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise _twice(next(key for place, key in enumerate(keys) if key in keys[:place]))
    return dict(pairs)


def _twice(key: str) -> ValueError:
    return ValueError(f"{shown(key)} is stated twice.")


class _NotedKeys(dict):
    """A mapping that notes a key stated twice: plain readers keep the last value without a word.

    It only notes, because ijson's reader in C goes on after an exception from here, into an undefined state.
    """

    twice: str | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.twice = key
        super().__setitem__(key, value)


def _plain(value: Any) -> Any:
    """A row of plain mappings. Raises `ValueError` for a key that is stated twice anywhere in it."""
    if isinstance(value, _NotedKeys):
        if value.twice is not None:
            raise _twice(value.twice)
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _checked(row: Any) -> Any:
    """The row, or the `ValueError` that says what is wrong with it alone."""
    try:
        return _plain(row)
    except ValueError as error:
        return error


def _array_rows(file: _Joined, path: str) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        for number, row in enumerate(ijson.items(file, "item", use_float=True, map_type=_NotedKeys), start=1):
            yield number, _checked(row)
    except UnicodeDecodeError:
        raise
    except ijson.JSONError as error:
        what = _first_line(error)
        place = "text after the closing bracket of the array" if "trailing garbage" in what else f"row {number + 1}"
        why = "it is damaged, was not written to its end, or is several files in one."
        raise ValueError(fit(f"{end_of(path)}, {place}: not JSON: {what}; {why}")) from None
    except ValueError as error:
        raise ValueError(f"{end_of(path)}, row {number + 1}: {error}") from None


def _first_line(error: ijson.JSONError) -> str:
    text = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
    return text.strip().splitlines()[0]

"""Rows of JSON and JSON Lines files one at a time: a 1 GB array is never in memory whole, and bad rows are named."""

import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import fsspec

CHUNK = 1 << 20  # characters read at a time


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
        with fsspec.open(address, "rt", encoding="utf-8-sig", compression="infer") as file:
            start = file.read(CHUNK)
            while start and not start.strip():
                start = file.read(CHUNK)
            if not start:
                raise ValueError(f"{path}: no rows; the file is empty.")
            yield from (_array_rows if start.lstrip().startswith("[") else _line_rows)(file, start, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}).") from None
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: a damaged archive ({error}); fetch it again.") from None


def _zip_member(path: str) -> str:
    """Address of the one file in a zip: fsspec alone would take the first and be silent about the others."""
    try:
        with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a zip file ({error}); fetch it again.") from None
    names = [name for name in names if name.endswith((".json", ".jsonl"))] or names
    if len(names) != 1:
        raise ValueError(f"{path}: holds {len(names)} files ({', '.join(names[:5])}); unpack it and name one of them.")
    return f"zip://{names[0]}::{path}"


def _line_rows(file: IO[str], start: str, path: str) -> Iterator[tuple[int, Any]]:
    rest = start
    number = 0
    while rest:
        *lines, rest = rest.split("\n")  # not splitlines(), which also breaks at characters JSON strings may hold
        for line in lines:
            number += 1
            if line.strip():
                yield number, _loads(line, number)
        chunk = file.read(CHUNK)
        if not chunk:
            break
        rest += chunk
    if rest.strip():
        yield number + 1, _loads(rest, number + 1)


def _loads(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        hint = " (one JSON document must be an array of rows; JSON Lines has one row per line)" if number == 1 else ""
        return ValueError(f"not JSON: {error}{hint}.")


class _Window:
    """The part of a file that is being looked at; grows at the end, shrinks at the start."""

    def __init__(self, file: IO[str], text: str):
        self.file = file
        self.text = text
        self.position = 0
        self.is_whole = False

    def grow(self) -> None:
        """Read as much again as there is left, so that a long row is not parsed over and over."""
        rest = self.text[self.position :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        self.text, self.position, self.is_whole = rest + chunk, 0, not chunk

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end of the file."""
        while True:
            while self.position < len(self.text):
                if not self.text[self.position].isspace():
                    return self.text[self.position]
                self.position += 1
            if self.is_whole:
                return ""
            self.grow()


def _array_rows(file: IO[str], start: str, path: str) -> Iterator[tuple[int, Any]]:
    window = _Window(file, start)
    window.peek()
    window.position += 1  # the opening bracket
    number = 0
    while window.peek() != "]":
        number += 1
        yield number, _next_value(window, path, number)
        character = window.peek()
        if character == ",":
            window.position += 1
        elif character != "]":
            what = f"comes {character!r}, not ',' or ']'" if character else "the file ends"
            raise ValueError(f"{path}: after row {number} {what}; it is damaged or was not written to its end.")
    window.position += 1
    if window.peek():
        raise ValueError(f"{path}: text after the closing bracket of the array; is it several files in one?")


def _next_value(window: _Window, path: str, number: int) -> Any:
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            # Only what the window cuts off can become right with more text: an open string, or an error at its end.
            is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - 8
            if window.is_whole or not is_cut:
                raise ValueError(f"{path}, row {number}: not JSON: {error.msg}; the file is damaged.") from None
        else:
            if end < len(window.text) or window.is_whole:  # a number at the very end may go on
                window.position = end
                return value
        window.grow()

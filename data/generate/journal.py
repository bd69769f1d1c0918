"""A journal of finished work that survives a kill and does not grow in memory."""

import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Journal:
    """An append-only JSON Lines file of finished work. A line that a kill cut short does not count and is cut off.

    Where each key's line begins is looked up in a temporary SQLite table, which the system keeps on the disk when it
    grows: a million entries take no memory.

    Args:
        path: of the file; made when it does not exist.

    Raises:
        ValueError: when another process writes to it, or a line in the middle is not JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock")  # let go by the system when the process is killed
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.path}: another run is writing to it; wait for it or choose another output."
            ) from None
        self._index = sqlite3.connect("", isolation_level=None)  # no name: a temporary file of the process's own
        self._index.execute("PRAGMA synchronous = OFF")
        self._index.execute("CREATE TABLE work (key TEXT PRIMARY KEY, kind TEXT, start INTEGER) WITHOUT ROWID")
        self._index.execute("CREATE TABLE expected (key TEXT PRIMARY KEY) WITHOUT ROWID")
        self._file = open(self.path, "ab+")  # noqa: SIM115 - closed by __exit__
        try:
            self._read()
        except ValueError:
            self.__exit__()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        self._index.execute("BEGIN")
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._note(entry["key"], kind_of(entry), whole)
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{self.path}, line {number}: not an entry of a journal; delete the file.") from None
            whole += len(line)
        self._index.execute("COMMIT")
        self._file.truncate(whole)

    def _note(self, key: str, kind: str, start: int) -> None:
        self._index.execute("INSERT OR REPLACE INTO work VALUES (?, ?, ?)", (key, kind, start))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._index.close()
        self._lock.release()

    def __contains__(self, key: str) -> bool:
        return self._index.execute("SELECT 1 FROM work WHERE key = ?", (key,)).fetchone() is not None

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a key, with its `kind`."""
        row = self._index.execute("SELECT start FROM work WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        self._file.seek(row[0])
        entry = json.loads(self._file.readline())
        return {**entry, "kind": kind_of(entry)}

    def count(self, kind: str) -> int:
        """How many entries are of a kind."""
        return self._index.execute("SELECT count(*) FROM work WHERE kind = ?", (kind,)).fetchone()[0]

    def forget(self, *kinds: str) -> None:
        """Take entries of these kinds as not made, until they are added again."""
        for kind in kinds:
            self._index.execute("DELETE FROM work WHERE kind = ?", (kind,))

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry, `{"key", "kind", ...}`; it is on the disk when this returns."""
        self.add_many([entry])

    def add_many(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write several entries; all are on the disk when this returns."""
        self._file.seek(0, os.SEEK_END)
        for entry in entries:
            start = self._file.tell()
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._note(entry["key"], kind_of(entry), start)
        self._file.flush()
        os.fsync(self._file.fileno())

    def expect(self, keys: Iterable[str]) -> None:
        """Remember which keys belong to the work at hand, for `is_expected`."""
        self._index.executemany("INSERT OR IGNORE INTO expected VALUES (?)", ((key,) for key in keys))

    def is_expected(self, key: str) -> bool:
        """Whether a key was given to `expect`."""
        return self._index.execute("SELECT 1 FROM expected WHERE key = ?", (key,)).fetchone() is not None


def kind_of(entry: dict[str, Any]) -> str:
    """answer, refused, cut or problem."""
    return str(entry.get("kind") or ("problem" if "problem" in entry else "answer"))

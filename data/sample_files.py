"""Samples as JSON, journals of finished work that survive a kill."""

import base64
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from fusedvlm.data.sources.converters import Sample
from fusedvlm.files import open_atomically


def open_output(path: str | Path | None) -> AbstractContextManager[IO[str] | None]:
    """A text file that appears under its name only when everything is written; None opens nothing."""
    return nullcontext() if path is None else open_atomically(path)


def as_json(sample: Sample) -> dict[str, Any]:
    """A sample as JSON can hold it: absolute image paths, embedded images as data URIs."""
    return {**sample, "images": [image_reference(image) for image in sample["images"]]}


def image_reference(image: Any) -> str:
    """An image as text from which it can be loaded anywhere on this machine."""
    if isinstance(image, bytes):
        return f"data:image;base64,{base64.b64encode(image).decode()}"
    if "://" in image or image.startswith("data:"):
        return image
    return os.path.abspath(image)


def image_bytes(image: Any) -> bytes:
    """The bytes of an image's file, as they are.

    Raises:
        ValueError: naming the image that cannot be read, or that is on the web.
    """
    if isinstance(image, bytes):
        return image
    if image.startswith("data:"):
        return base64.b64decode(image.partition(",")[2])
    if "://" in image:
        raise ValueError(f"{image}: images on the web are not fetched here; download them first.")
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"{image}: cannot be read ({error.strerror}).") from None


class Journal:
    """An append-only JSON Lines file of finished work. A line that a kill cut short does not count and is cut off.

    Args:
        path: of the file; made when it does not exist.

    Raises:
        ValueError: when another process writes to it, or a line in the middle is not JSON.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock")  # let go by the system when the process is killed
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.path}: another run is writing to it; wait for it or choose another output."
            ) from None
        try:
            self._read()
        except ValueError:
            self._lock.release()
            raise

    def _read(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        whole = 0
        with open(self.path, "ab+") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    self.entries[entry["key"]] = entry
                except (ValueError, TypeError, KeyError):
                    raise ValueError(
                        f"{self.path}, line {number}: not an entry of a journal; delete the file."
                    ) from None
                whole += len(line)
            file.truncate(whole)

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._lock.release()

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def forget(self, is_void: Callable[[dict[str, Any]], bool]) -> None:
        """Take entries as not made, until they are added again."""
        self.entries = {key: entry for key, entry in self.entries.items() if not is_void(entry)}

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry; it is on the disk when this returns."""
        self.entries[entry["key"]] = entry
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

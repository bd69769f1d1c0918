"""Pairs that differ after a shared prefix: preference data (two answers) or two images, streamed row by row."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
DEFAULT_QUESTION = "Describe the image."


@dataclass(frozen=True)
class TextPair:
    """One prompt (chat messages) and two answers."""

    messages: list[dict]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class ImagePair:
    """One question and two images (PIL, path or URL)."""

    question: str
    image_a: Any
    image_b: Any


def stream_rows(
    source: str,
    split: str = "train",
    revision: str | None = None,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    skip: int = 0,
) -> Iterator[tuple[int, dict]]:
    """(row number, row) of this shard, in order, without loading the data set.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a folder `datasets` can read, or a Hub data set.
        split: of a folder or Hub data set.
        revision: commit, tag or branch of a Hub data set.
        limit: rows to read at most, over all shards.
        shard: (rank, number of shards); row r belongs to shard r % number.
        skip: rows of this shard to leave out at the start, because they are done.

    Raises:
        ValueError: a local file of another type.
        OSError: a file that does not exist.
    """
    rank, world = shard
    dataset = _open(source, split, revision)
    first = rank + skip * world
    numbers = range(first, limit, world) if limit is not None else _count(first, world)
    rows = islice(dataset.skip(first), 0, None, world)
    yield from zip(numbers, rows, strict=False)


def read_pair(row: dict, number: int, images: bool, folder: Path | None = None) -> TextPair | ImagePair:
    """A row as a pair.

    Text: columns chosen and rejected with prompt, or question and optionally system; each a string, or chat messages
    as in TRL's preference format (where the prompt may be part of both). Images: image_a, image_b and optionally
    question; relative paths are relative to `folder`.

    Raises:
        ValueError: naming the row and what it lacks.
    """
    names = ("image_a", "image_b") if images else ("chosen", "rejected")
    if missing := [name for name in names if row.get(name) is None]:
        raise ValueError(f"Row {number}: no {', '.join(missing)}; its columns are {', '.join(row)}.")
    return _image_pair(row, folder) if images else _text_pair(row, number)


def local_folder(source: str) -> Path | None:
    """Folder of a local file, against which image paths are resolved."""
    return Path(source).parent if Path(source).is_file() else None


def _open(source: str, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    path = Path(source)
    if path.suffix in FILE_TYPES or path.is_file():
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"{source}: unknown type; files are {', '.join(FILE_TYPES)}.")
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file.")
        return load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train", streaming=True)
    return load_dataset(source, split=split, revision=revision, streaming=True)


def _count(first: int, step: int) -> Iterator[int]:
    number = first
    while True:
        yield number
        number += step


def _image_pair(row: dict, folder: Path | None) -> ImagePair:
    def resolve(image: Any) -> Any:
        if isinstance(image, str) and folder is not None and not image.startswith(("http://", "https://", "data:")):
            return str(folder / image)
        return image

    return ImagePair(row.get("question") or DEFAULT_QUESTION, resolve(row["image_a"]), resolve(row["image_b"]))


def _text_pair(row: dict, number: int) -> TextPair:
    chosen, rejected = _messages(row["chosen"], "assistant"), _messages(row["rejected"], "assistant")
    if not chosen or not rejected:
        raise ValueError(f"Row {number}: chosen or rejected is an empty list.")
    prompt = _prompt(row)
    if not prompt:
        prompt = chosen[:-1]
        if prompt != rejected[:-1]:
            raise ValueError(f"Row {number}: no prompt, and chosen and rejected do not share their first messages.")
    if not prompt:
        raise ValueError(f"Row {number}: no prompt or question; its columns are {', '.join(row)}.")
    return TextPair(prompt, chosen[-1]["content"], rejected[-1]["content"])


def _prompt(row: dict) -> list[dict]:
    if row.get("prompt"):
        return _messages(row["prompt"], "user")
    if not row.get("question"):
        return []
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": row["question"]}]


def _messages(value: str | list[dict], role: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [{"role": message["role"], "content": message["content"]} for message in value]

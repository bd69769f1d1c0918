"""Rows of a dataset on the Hub, or of one that `datasets` wrote to the disk, with pictures as their bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets


def dataset_rows(path: str, split: str, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`row N`, columns) of a split.

    Args:
        path: folder, or OWNER/NAME on the Hub.
        split: "test" by default, the first one of a folder.
        limit: first rows only.

    Raises:
        ValueError: in one line, when there is no such dataset or split.
    """
    dataset = _load(path, split)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    for number, row in enumerate(dataset):
        yield f"row {number}", row


def _load(path: str, split: str) -> Any:
    try:
        if not Path(path).is_dir():
            return datasets.load_dataset(path, split=split or "test")
        found = datasets.load_from_disk(path)
        return found[split or next(iter(found))] if isinstance(found, dict) else found
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: no dataset that can be read ({reason}).") from error

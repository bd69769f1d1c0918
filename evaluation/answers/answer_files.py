"""Every question with its answers and scores, in one compressed file per task beside the results."""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedvlm.evaluation.tasks.task import Judged


def write_answers(path: Path, judged: Mapping[int, Sequence[Judged]]) -> None:
    """Write gzipped JSON Lines, whole or not at all; equal answers give equal bytes.

    Args:
        path: NAME.answers.jsonl.gz.
        judged: {m: judged answers}.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as raw:
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                for m in sorted(judged):
                    for entry in judged[m]:
                        file.write(json.dumps(as_row(m, entry), ensure_ascii=False).encode() + b"\n")
            raw.flush()
            os.fsync(raw.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def as_row(m: int, entry: Judged) -> dict[str, Any]:
    """A line of the file."""
    record = entry.record
    return {
        "index": record.index,
        "num_visual_tokens": m,
        "question": record.question,
        "right": list(record.answers),
        "answer": entry.answer,
        "parsed": entry.parsed,
        "score": entry.score,
        **({"category": record.fields["category"]} if "category" in record.fields else {}),
    }


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file that `write_answers` wrote. Raises `ValueError` naming a damaged one."""
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}).") from error

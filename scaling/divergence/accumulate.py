"""Run a divergence measurement: batches, progress, a state file to continue from, and several processes."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .branches import BranchEncoder
from .estimators import DivergenceStatistics


@dataclass
class Progress:
    """What one process has done: rows consumed in its shard, pairs without tokens, and the statistics."""

    statistics: DivergenceStatistics
    done: int = 0
    skipped: int = 0


class StateFile:
    """Progress on disk, written whole or not at all, and refused when it belongs to another measurement.

    Args:
        path: where; None saves nothing.
        identity: everything that decides the numbers (model, data, batch size ...), JSON-ready.
    """

    def __init__(self, path: Path | None, identity: dict) -> None:
        self.path, self.identity = path, identity

    def load(self, fresh: DivergenceStatistics) -> Progress:
        """Saved progress, or none with `fresh` statistics.

        Raises:
            ValueError: when the file was made by another measurement, naming what differs.
        """
        if self.path is None or not self.path.exists():
            return Progress(fresh)
        with np.load(self.path) as saved:
            meta = json.loads(str(saved["meta"]))
            arrays = {name: saved[name] for name in saved.files if name != "meta"}
        differs = [
            f"{name} is {meta['identity'].get(name)!r}, not {value!r}"
            for name, value in self.identity.items()
            if meta["identity"].get(name) != value
        ]
        if differs:
            raise ValueError(f"{self.path} belongs to another measurement: {'; '.join(differs)}. Name another file.")
        statistics = DivergenceStatistics(fresh.max_tokens, fresh.reading, **arrays)
        return Progress(statistics, meta["done"], meta["skipped"])

    def save(self, progress: Progress) -> None:
        """Write progress atomically; a kill leaves the previous state."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        meta = {"identity": self.identity, "done": progress.done, "skipped": progress.skipped}
        temporary = self.path.with_name(self.path.name + ".partial")
        with temporary.open("wb") as stream:
            arrays: dict[str, Any] = {"meta": json.dumps(meta), **progress.statistics.arrays()}
            np.savez(stream, **arrays)
        temporary.replace(self.path)


def accumulate(
    encoder: BranchEncoder,
    numbered_pairs: Iterable[tuple[int, object]],
    progress: Progress,
    state: StateFile,
    batch_size: int = 4,
    save_every: int = 32,
) -> Iterator[int]:
    """Add pairs to `progress`, yielding how many after each batch. Saves every `save_every` batches and at the end.

    Batches are cut from the start of the shard, so a resumed run forms the same ones and gives the same numbers.

    Args:
        numbered_pairs: (row number, pair), without those already done.
    """
    for count, batch in enumerate(_batches(numbered_pairs, batch_size), 1):
        for (number, _), states in zip(batch, encoder.states([pair for _, pair in batch]), strict=True):
            if states is None:
                progress.skipped += 1
            else:
                progress.statistics.add(*states, seed=number)
        progress.done += len(batch)
        if count % save_every == 0:
            state.save(progress)
        yield len(batch)
    state.save(progress)


def gather(progress: Progress) -> Progress:
    """Sum over all processes, in order of rank, on every one of them. With one process it is the identity."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    if PartialState().num_processes == 1:
        return progress
    first, *others = gather_object([progress])
    for other in others:
        first.statistics.merge(other.statistics)
        first.done += other.done
        first.skipped += other.skipped
    return first


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

"""Micro-batches of one source each: so many samples of every source in every optimizer step.

Long and short answers in one batch pad each other; in micro-batches of their own they do not, and every source can have
its own number of visual tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .mixture import endless_rows


def source_names(dataset: Any) -> np.ndarray:
    """(n,) the name of every entry's source, without reading the entries.

    Args:
        dataset: a `Mixture`, a `datasets.Dataset` with a column `source`, a list of samples with an entry `source`, or
            anything with a method `source_names()`.

    Raises:
        ValueError: for a dataset that cannot tell.
    """
    if hasattr(dataset, "source_names"):
        return np.asarray(dataset.source_names())
    if "source" in (getattr(dataset, "column_names", None) or ()):
        return np.asarray(dataset["source"])
    if isinstance(dataset, list) and all("source" in sample for sample in dataset):
        return np.asarray([sample["source"] for sample in dataset])
    kind = "a stream" if not hasattr(dataset, "__len__") else f"a {type(dataset).__name__}"
    raise ValueError(
        f"batch_groups needs the source of every row beforehand, which {kind} does not tell: use sized sources, or "
        "give the dataset a method source_names()."
    )


class GroupedBatches(Sampler[list[int]]):
    """Batches of indices, source by source, the same sources and sizes in every optimizer step.

    What comes when is a function of (seed, epoch, dataset) alone, so a resumed run skips what it had. With several
    ranks a micro-batch of each follows the other, as accelerate deals them out.

    Args:
        dataset: see `source_names`.
        groups: {source: samples of a step on each rank}, in this order.
        largest: most samples of a micro-batch; larger groups are cut into several.
        ranks: processes that train together.
        seed: of the order within each source.

    Raises:
        ValueError: for a source that the dataset does not have.
    """

    drop_last = True  # every rank has the same number of batches already

    def __init__(self, dataset: Any, groups: Mapping[str, int], largest: int, ranks: int = 1, seed: int = 0) -> None:
        self.dataset, self.groups, self.largest = dataset, dict(groups), largest
        self.ranks, self.seed, self.epoch = ranks, seed, 0
        names, counts = np.unique(source_names(dataset), return_counts=True)
        self.sizes = dict(zip(names.tolist(), counts.tolist(), strict=True))
        missing = [name for name in groups if name not in self.sizes]
        if missing:
            raise ValueError(
                f"batch_groups names {', '.join(missing)[:100]}, but the data's sources are "
                f"{', '.join(map(str, self.sizes))[:140]}."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch: every source that is named is seen whole, short ones several times."""
        return max(-(-self.sizes[name] // (count * self.ranks)) for name, count in self.groups.items())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; `Trainer` does so at the start of each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * micro_batches(self.groups, self.largest) * self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        names, steps = source_names(self.dataset), self.steps
        rows = {}
        for number, (name, count) in enumerate(self.groups.items()):
            entries, wanted = np.flatnonzero(names == name), steps * count * self.ranks
            rows[name] = entries[endless_rows(len(entries), self.epoch * wanted, wanted, self.seed, number)]
        for step in range(steps):
            for name, count in self.groups.items():
                own = rows[name].reshape(steps, self.ranks, count)[step]
                for start in range(0, count, self.largest):
                    for rank in range(self.ranks):
                        yield own[rank, start : start + self.largest].tolist()


def micro_batches(groups: Mapping[str, int], largest: int) -> int:
    """Micro-batches of an optimizer step on each rank."""
    return sum(-(-count // largest) for count in groups.values())


def source_of_micro_batch(groups: Mapping[str, int], largest: int) -> Sequence[str]:
    """The source of each micro-batch of a step, in order."""
    return [name for name, count in groups.items() for _ in range(0, count, largest)]

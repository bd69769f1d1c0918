"""Weighted, seeded mixtures of sources with a random access that needs no state, so that training resumes exactly.

A `Mixture` is one list: entry i is always the same sample for the same (sources, weights, seed, epoch), whoever asks
and in whatever order. `Trainer` remembers how many batches it has taken and its sampler decides which i they hold, so
an interrupted run continues with exactly the samples it has not seen, on any number of ranks and workers.

How often a source is drawn is a quota, not a dice roll: in an epoch of L samples source s is drawn L w_s times, rounded
so that the quotas add up to L. Its rows come from seeded permutations laid end to end, one after the other, which go on
where the last epoch stopped: no row comes a second time before every row of its source has come once. Epochs go on when
`MixtureEpochs` is among the trainer's callbacks; without it every epoch repeats the rows of the first in another order.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

Stop = Literal["all_exhausted", "first_exhausted"]


class Mixture(Dataset):
    """A map-style mixture of sized sources.

    Args:
        sources: lists, `datasets.Dataset`s or anything with `len()` and `[row]`.
        weights: share of each source in the mixture, in any unit; by default its number of rows, so that an epoch is
            every row once.
        seed: of the order.
        stop: an epoch ends when every source has been seen whole ("all_exhausted": small sources with a large weight
            come several times), or when the first one has ("first_exhausted": no row comes twice in an epoch).
        temperature: weights are taken to the power 1 / temperature: 1 leaves them, a large one makes them equal.
        names: of the sources, for messages.

    Raises:
        ValueError: for no or empty sources, and weights that are not positive numbers, one per source.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        stop: Stop = "all_exhausted",
        temperature: float = 1.0,
        names: Sequence[str] | None = None,
    ) -> None:
        self.sources = list(sources)
        self.names = list(names) if names is not None else [f"source {number}" for number in range(len(self.sources))]
        self.sizes = [len(source) for source in self.sources]
        empty = [name for name, size in zip(self.names, self.sizes, strict=True) if size == 0]
        if empty:
            raise ValueError(f"No rows in {', '.join(empty)}: check its path and fraction, or leave it out.")
        self.seed = seed
        self.stop = stop
        self.shares = normalized_weights(self.sizes if weights is None else weights, self.names, temperature)
        self.quotas = epoch_quotas(self.sizes, self.shares, stop)
        # In shared memory: worker processes that outlive an epoch must learn of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return sum(self.quotas)

    @property
    def epoch(self) -> int:
        """Which epoch's order `[i]` follows."""
        return int(self._epoch)

    def start_epoch(self, epoch: int) -> None:
        """Choose the epoch; `MixtureEpochs` does so at the start of each.

        It is not called `set_epoch`, because accelerate calls a method of that name in some runs (one process) and not
        in others (several, or the first epoch after a resume), which would give a resumed run another order.
        """
        self._epoch.fill_(epoch)

    def locate(self, index: int) -> tuple[int, int]:
        """Source number and row of entry `index` in this epoch.

        Raises:
            IndexError: outside 0 .. len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Sample {index} of a mixture of {len(self)}.")
        _, source_of, row_of = self._plan_of_epoch()
        return int(source_of[index]), int(row_of[index])

    def source_names(self) -> np.ndarray:
        """(len,) the name of every entry's source in this epoch."""
        return np.asarray(self.names)[self._plan_of_epoch()[1]]

    def _plan_of_epoch(self) -> tuple[int, np.ndarray, np.ndarray]:
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = self._make_plan(self.epoch)
        return self._plan

    def __getitem__(self, index: int) -> Any:
        source, row = self.locate(index)
        return self.sources[source][row]

    def state_dict(self) -> dict[str, int]:
        """What, besides the constructor's arguments, decides the order."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the epoch of `state_dict()`.

        Raises:
            ValueError: when the state is of a mixture with another seed.
        """
        if state["seed"] != self.seed:
            raise ValueError(f"This state is of a mixture with seed {state['seed']}, this one has seed {self.seed}.")
        self.start_epoch(state["epoch"])

    def _make_plan(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Source and row of every entry of an epoch, 2 + 8 bytes per entry."""
        source_of = np.repeat(np.arange(len(self.sources), dtype=np.int16), self.quotas)
        source_of = generator(self.seed, 0, epoch).permutation(source_of)
        row_of = np.empty(len(self), dtype=np.int64)
        for source, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            row_of[source_of == source] = endless_rows(size, epoch * quota, quota, self.seed, source)
        return epoch, source_of, row_of


def generator(*key: int) -> np.random.Generator:
    """Random numbers that are a function of `key` alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def endless_rows(size: int, start: int, count: int, seed: int, source: int) -> np.ndarray:
    """Entries `start : start + count` of seeded permutations of `range(size)` laid end to end.

    >>> rows = endless_rows(size=5, start=0, count=10, seed=0, source=0)
    >>> sorted(rows[:5].tolist()) == sorted(rows[5:].tolist()) == [0, 1, 2, 3, 4]
    True
    """
    passes = range(start // size, -(-(start + count) // size))
    rows = [generator(seed, 1 + source, number).permutation(size) for number in passes]
    offset = start - passes.start * size
    return np.concatenate(rows)[offset : offset + count]


def normalized_weights(weights: Sequence[float], names: Sequence[str], temperature: float = 1.0) -> np.ndarray:
    """Shares that add up to one.

    Raises:
        ValueError: for a wrong number of weights, weights that are not positive and finite, a temperature that is not.
    """
    values = np.asarray(weights, dtype=np.float64)
    if len(names) == 0:
        raise ValueError("A mixture needs at least one source.")
    if values.shape != (len(names),):
        raise ValueError(f"{values.size} weights for {len(names)} sources; give one for each.")
    wrong = [
        f"{name}: {value}" for name, value in zip(names, values, strict=True) if not (value > 0 and np.isfinite(value))
    ]
    if wrong:
        raise ValueError(f"Weights must be positive numbers ({'; '.join(wrong)}); leave out a source that has none.")
    if not (temperature > 0 and np.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be a positive number; 1 leaves the weights as they are.")
    logs = np.log(values) / temperature
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()


def epoch_quotas(sizes: Sequence[int], shares: np.ndarray, stop: Stop = "all_exhausted") -> list[int]:
    """How often each source is drawn in an epoch.

    Raises:
        ValueError: for an unknown `stop`, or when the first exhausted source leaves nothing for another.

    >>> epoch_quotas([100, 10], np.array([0.5, 0.5])), epoch_quotas([100, 10], np.array([0.5, 0.5]), "first_exhausted")
    ([100, 100], [10, 10])
    """
    needed = np.asarray(sizes) / shares  # epoch length at which each source has been seen whole
    if stop == "all_exhausted":
        return [max(size, round_up(value)) for value, size in zip(shares * needed.max(), sizes, strict=True)]
    if stop == "first_exhausted":
        quotas = [int(value + 1e-9 * value) for value in shares * needed.min()]
        if 0 in quotas:
            raise ValueError(f"With first_exhausted an epoch draws {quotas} rows: raise the weights that give 0.")
        return quotas
    raise ValueError(f"stop={stop!r} must be 'all_exhausted' or 'first_exhausted'.")


def round_up(value: float) -> int:
    """Smallest integer not below `value`, where a rounding error above an integer counts as that integer."""
    return int(np.ceil(value * (1 - 1e-9)))

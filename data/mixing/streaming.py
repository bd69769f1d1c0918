"""Mixtures of streams: sources too large to be counted or cached, drawn by seeded dice, resumable to the sample."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .mixture import generator, normalized_weights

SHUFFLE_BLOCK = 1000
STOPS = ("all_exhausted", "first_exhausted", "never")
END = object()  # a source has no more rows


class StreamingMixture(IterableDataset):
    """An iterable mixture. One epoch is one iteration.

    Every process can produce the whole sequence, which depends on the arguments and the epoch alone. Ranks share it out
    through accelerate (with `dispatch_batches: false`: batches of unequal length cannot be sent from one rank to
    another), and a `DataLoader`'s workers take every n-th sample each, so no sample comes twice or is lost. The price
    is that each worker reads every source's text (never its images).

    A stopped run goes on exactly: `Trainer` skips the batches it had, or `state_dict()` and `load_state_dict()` go to
    the place at once. The state is of the process that iterates: with worker processes it is theirs, so use the first
    way, or torchdata's `StatefulDataLoader`.

    Args:
        sources: iterables that start anew each time, in the same order: `load_source(... streaming=True)`,
            `datasets.IterableDataset`s, lists.
        weights: probability of each source, in any unit; by default all are equal, since streams have no length.
        seed: of the dice and of the order within blocks.
        stop: "all_exhausted": an epoch ends when each source has ended at least once, those that end early begin again;
            "first_exhausted": it ends with the first source that ends; "never": for `Trainer` with `max_steps`, which
            counts one long epoch and can skip to any place in it.
        temperature: weights are taken to the power 1 / temperature.
        names: of the sources, for messages.
        shuffle_block: rows are shuffled within blocks of this many rows of a source; 0 or 1 leaves their order.

    Raises:
        ValueError: for wrong weights, and on the way for a source that has no rows.
    """

    def __init__(
        self,
        sources: Sequence[Iterable],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        stop: str = "all_exhausted",
        temperature: float = 1.0,
        names: Sequence[str] | None = None,
        shuffle_block: int = SHUFFLE_BLOCK,
    ) -> None:
        super().__init__()
        self.sources = list(sources)
        self.names = list(names) if names is not None else [f"source {number}" for number in range(len(self.sources))]
        self.shares = normalized_weights(
            [1.0] * len(self.sources) if weights is None else weights, self.names, temperature
        )
        if stop not in STOPS:
            raise ValueError(f"stop={stop!r} must be one of {', '.join(STOPS)}.")
        self.seed = seed
        self.stop = stop
        self.shuffle_block = max(1, shuffle_block)
        self.epoch = 0
        self._resume: dict[str, Any] | None = None
        self._running: _Run | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; `Trainer` does so at the start of each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        run = _Run(self)
        if self._resume is not None and self._resume["epoch"] == self.epoch:
            run.load(self._resume)
        self._resume = None
        self._running = run
        worker = get_worker_info()
        share, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for sample in run:
            if (run.position - 1) % count == share:
                yield sample

    def state_dict(self) -> dict[str, Any]:
        """Where the last iteration is: plain numbers and lists, small."""
        return (self._running or _Run(self)).state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin after the last sample before `state_dict()` was called.

        Raises:
            ValueError: when the state is of a mixture with other arguments.
        """
        mine = _Run(self).arguments()
        if state["arguments"] != mine:
            raise ValueError(f"This state is of another mixture: {state['arguments']}, not {mine}.")
        self.epoch = state["epoch"]
        self._resume = copy.deepcopy(state)


class _Run:
    """One iteration over a mixture."""

    def __init__(self, mixture: StreamingMixture) -> None:
        self.mixture = mixture
        self.epoch = mixture.epoch
        self.position = 0  # samples given so far
        self.dice = generator(mixture.seed, 0, mixture.epoch)
        self.readers = [
            _BlockReader(source, name, mixture.shuffle_block, (mixture.seed, 1 + number, mixture.epoch))
            for number, (source, name) in enumerate(zip(mixture.sources, mixture.names, strict=True))
        ]

    def __iter__(self) -> Iterator[Any]:
        while True:
            reader = self.readers[int(self.dice.choice(len(self.readers), p=self.mixture.shares))]
            sample = reader.take()
            if sample is END:
                reader.begin_pass()
                if self.is_over():
                    return
                sample = reader.take()
                if sample is END:
                    raise ValueError(f"No rows in {reader.name}: check its path and fraction, or leave it out.")
            self.position += 1
            yield sample

    def is_over(self) -> bool:
        """Whether enough sources have ended."""
        if self.mixture.stop == "never":
            return False
        ended = [reader.passes > 0 for reader in self.readers]
        return all(ended) if self.mixture.stop == "all_exhausted" else any(ended)

    def arguments(self) -> dict[str, Any]:
        """What must be equal for a state to be of use."""
        mixture = self.mixture
        return {
            "names": mixture.names,
            "shares": [round(float(share), 12) for share in mixture.shares],
            "seed": mixture.seed,
            "stop": mixture.stop,
            "shuffle_block": mixture.shuffle_block,
        }

    def state(self) -> dict[str, Any]:
        return {
            "arguments": self.arguments(),
            "epoch": self.epoch,
            "position": self.position,
            "dice": copy.deepcopy(self.dice.bit_generator.state),
            "sources": [reader.state() for reader in self.readers],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.dice.bit_generator.state = state["dice"]
        for reader, its_state in zip(self.readers, state["sources"], strict=True):
            reader.load(its_state)


class _BlockReader:
    """Rows of one source, shuffled within blocks. Its state is where the block begins and how much of it is used, so
    going on means reading one block again."""

    def __init__(self, source: Any, name: str, size: int, key: tuple[int, ...]) -> None:
        self.source, self.name, self.size, self.key = source, name, size, key
        self.has_state = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self.passes = -1
        self.begin_pass()

    def begin_pass(self) -> None:
        """Start from the source's first row."""
        self.passes += 1  # times the source has ended
        self.blocks = 0  # before this one, in this pass
        self.start: Any = None  # of this block: the source's state, or a number of rows; None is the source's start
        self.used = 0  # rows of this block that were taken
        self.block: list[Any] | None = None  # not read yet
        self.rows: Iterator[Any] | None = None

    def take(self) -> Any:
        """The next row, or END."""
        if self.block is None:
            self._read_block()
        if self.block and self.used == len(self.block):
            self.start = self.source.state_dict() if self.has_state else self.blocks * self.size + self.used
            self.blocks += 1
            self.used = 0
            self._read_block()
        if not self.block:
            return END
        self.used += 1
        return self.block[self.used - 1]

    def state(self) -> dict[str, Any]:
        return {"passes": self.passes, "blocks": self.blocks, "used": self.used, "start": copy.deepcopy(self.start)}

    def load(self, state: dict[str, Any]) -> None:
        self.passes, self.blocks = state["passes"], state["blocks"]
        self.used, self.start = state["used"], copy.deepcopy(state["start"])

    def _read_block(self) -> None:
        if self.rows is None:
            if self.has_state:
                self.source.load_state_dict(self.start)
            skipped = 0 if self.has_state else self.start or 0
            self.rows = islice(iterate(self.source), skipped, None)
        rows = list(islice(self.rows, self.size))
        if self.size > 1:
            rows = [rows[place] for place in generator(*self.key, self.passes, self.blocks).permutation(len(rows))]
        self.block = rows


def iterate(source: Any) -> Iterator[Any]:
    """All rows of a source, in a worker process too, where a `datasets.IterableDataset` would give a part of them."""
    if hasattr(source, "iter"):
        return ({name: values[0] for name, values in batch.items()} for batch in source.iter(batch_size=1))
    return iter(source)

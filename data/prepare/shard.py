"""Parts of a long work, for several machines or processes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """A part of the work: every `count`-th item, beginning with number `index` (from 0).

    >>> Shard.parse("3/16")
    Shard(index=2, count=16)
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """`3/16` is the third of sixteen; None is everything.

        Raises:
            ValueError: for anything that is not K/N with 1 <= K <= N.
        """
        if text is None:
            return cls()
        number, slash, count = text.partition("/")
        if not (slash and number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
            raise ValueError(f"--shard {text}: write K/N, such as 3/16 for the third of sixteen parts.")
        if not 1 <= int(number) <= int(count):
            raise ValueError(f"--shard {text}: parts are counted from 1, so write 1/N to N/N.")
        return cls(int(number) - 1, int(count))

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        """This part's items."""
        return islice(items, self.index, None, self.count)

    def size(self, total: int | None) -> int | None:
        """How many of `total` items are this part's."""
        return None if total is None else len(range(self.index, total, self.count))

    def name(self, path: Path) -> Path:
        """A file name of its own: `q.jsonl` becomes `q-00003-of-00016.jsonl`."""
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}-{self.index + 1:05d}-of-{self.count:05d}{path.suffix}")

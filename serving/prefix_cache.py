"""The language model's keys and values of prompts that were read, for those that begin alike."""

from collections.abc import Hashable, Sequence
from itertools import count
from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .byte_cache import ByteCache, size_of

SHORTEST = 4  # positions that are worth taking over


class PrefixCache:
    """Caches of a language model by what stood at every position: token ids, and names of visual tokens.

    A conversation's next turn begins with what the turns before it were; so do several questions behind a long system
    message. Only what is equal position by position is taken over, so that answers are those of a fresh cache.

    Args:
        max_bytes: bound on all that is kept; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.cache = ByteCache(max_bytes)
        self.reused_tokens = self.read_tokens = 0
        self._numbers = count()

    def take(self, keys: Sequence[Hashable]) -> tuple[Cache | None, int]:
        """A cache that begins as this prompt does, and how many positions it has; at least one is left to read.

        Returns:
            A cache of the caller's own; None where nothing fits.
        """
        best, length = None, SHORTEST - 1
        for entry in self.cache.keys():  # noqa: SIM118 - a list, the most recently used first
            found = self.cache.peek(entry)
            if found is None:
                continue
            known, state = found
            same = min(_common(known, keys), len(keys) - 1)
            if same > length:
                best, length = (entry, state), same
        self.read_tokens += len(keys)
        if best is None:
            return None, 0
        self.cache.get(best[0])
        self.reused_tokens += length
        return _begin(best[1], length), length

    def keep(self, keys: Sequence[Hashable], state: Any) -> None:
        """Keep what stands at the positions `keys`; caches that cannot be cut are left alone."""
        if self.cache.max_bytes == 0 or not is_plain(state) or len(keys) != state.get_seq_length():
            return
        keys = tuple(keys)
        for entry in self.cache.keys():  # noqa: SIM118
            found = self.cache.peek(entry)
            if found is not None and _common(found[0], keys) == len(found[0]):
                self.cache.drop(entry)  # the beginning of this one
        # The key list itself counts too: about a pointer and a small object each.
        self.cache.put(next(self._numbers), (keys, state), size_of(state) + 64 * len(keys))


def is_plain(state: Any) -> bool:
    """Whether every layer keeps all keys and values of one row, so that it can be cut anywhere."""
    layers: Any = getattr(state, "layers", None) or ()
    return len(layers) > 0 and all(
        type(layer) is DynamicLayer and layer.keys is not None and len(layer.keys) == 1 for layer in layers
    )


def _begin(state: Cache, length: int) -> Cache:
    """The first positions of a cache, as one that can be extended while the other stays as it is."""
    begun = DynamicCache()
    for number, layer in enumerate(state.layers):
        parts: Any = layer
        begun.update(parts.keys[:, :, :length], parts.values[:, :, :length], number)
    return begun


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many entries two sequences have in common from the start."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))

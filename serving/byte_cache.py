"""A least-recently-used cache bounded by bytes, and what identifies a picture in it."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.cache_utils import Cache

from fusedvlm.processing.image_processing_fusedvlm_loading import load_image


class ByteCache:
    """Values by key, the least recently used of which leave when their bytes exceed the bound. Safe for threads.

    Args:
        max_bytes: bound on the values' bytes; 0 keeps nothing.

    Raises:
        ValueError: for a negative bound.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} must not be negative; 0 keeps nothing.")
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """The value, which becomes the last to leave; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def peek(self, key: Hashable) -> Any:
        """The value as `get` gives it, without counting as a use."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry[0]

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        """Keep a value; one that is larger than the bound is not kept at all."""
        with self._lock:
            self._drop(key)
            if num_bytes > self.max_bytes:
                return
            self._entries[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
                self.evictions += 1

    def drop(self, key: Hashable) -> None:
        """Forget a value, if it is there."""
        with self._lock:
            self._drop(key)

    def keys(self) -> list[Hashable]:
        """Keys, the most recently used first."""
        with self._lock:
            return [*reversed(self._entries)]

    def clear(self) -> None:
        """Forget everything but the counters."""
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry[1]


def size_of(value: torch.Tensor | Cache) -> int:
    """Bytes of a tensor, or of the keys and values of a cache."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    layers: list[Any] = list(value.layers)
    return sum(size_of(part) for layer in layers for part in (layer.keys, layer.values) if part is not None)


@dataclass(frozen=True)
class KnownImage:
    """A picture and the digest of its content, which names it in caches.

    `source` is whatever the image processor reads; two pictures with one `key` have the same pixels.
    """

    key: str
    source: Any


def know_image(source: Any) -> KnownImage:
    """A picture by its content.

    Args:
        source: path, URL, base64 string, bytes, open file, PIL image, array or tensor.

    Raises:
        ValueError: one line naming the source, for anything that is not a whole picture of sane size.
        OSError: when a URL cannot be fetched or a file may not be read.
    """
    if isinstance(source, KnownImage):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return KnownImage(_digest("file", data), data)
    if isinstance(source, torch.Tensor):
        array = source.detach().cpu().contiguous()
        content = array.view(torch.uint8).numpy().tobytes() if array.ndim else b""
        return KnownImage(_digest(f"tensor {array.dtype} {tuple(array.shape)}", content), source)
    if isinstance(source, np.ndarray):
        return KnownImage(_digest(f"array {source.dtype} {source.shape}", np.ascontiguousarray(source)), source)
    if not isinstance(source, (str, os.PathLike, Image.Image, dict)) and not hasattr(source, "read"):
        return know_image(np.asarray(source))
    image = load_image(source)
    return KnownImage(_digest(f"pixels {image.size}", image.tobytes()), image)


def _digest(kind: str, content: Any) -> str:
    return hashlib.blake2b(content, digest_size=20, person=b"fusedvlm").hexdigest() + " " + kind

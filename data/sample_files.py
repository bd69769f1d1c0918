"""Samples as JSON, and files of them."""

import base64
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, overload

from fusedvlm.data.sources.converters import Sample
from fusedvlm.files import open_atomically


@overload
def open_output(path: str | Path) -> AbstractContextManager[IO[str]]: ...
@overload
def open_output(path: str | Path | None) -> AbstractContextManager[IO[str] | None]: ...
def open_output(path: str | Path | None) -> AbstractContextManager[IO[str] | None]:
    """A text file that appears under its name only when everything is written; None opens nothing."""
    return nullcontext() if path is None else open_atomically(path)


def as_json(sample: Sample) -> dict[str, Any]:
    """A sample as JSON can hold it: absolute image paths, embedded images as data URIs."""
    return {**sample, "images": [image_reference(image) for image in sample["images"]]}


def image_reference(image: Any) -> str:
    """An image as text from which it can be loaded anywhere on this machine."""
    if isinstance(image, bytes):
        return f"data:image;base64,{base64.b64encode(image).decode()}"
    if "://" in image or image.startswith("data:"):
        return image
    return os.path.abspath(image)


def image_bytes(image: Any) -> bytes:
    """The bytes of an image's file, as they are.

    Raises:
        ValueError: naming the image that cannot be read, or that is on the web.
    """
    if isinstance(image, bytes):
        return image
    if image.startswith("data:"):
        return base64.b64decode(image.partition(",")[2])
    if "://" in image:
        raise ValueError(f"{image}: images on the web are not fetched here; download them first.")
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"{image}: cannot be read ({error.strerror}).") from None

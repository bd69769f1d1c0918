"""Load any picture a user may hand over as upright 8-bit RGB, or say in one line why not."""

import base64
import binascii
import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from .image_processing_fusedvlm_whole import missing_part

# Pictures above this are refused before decoding: 179 megapixels is where Pillow itself speaks of a decompression bomb.
# Between half of it and this Pillow only warns; such a picture is loaded, unless warnings are errors.
MAX_PIXELS = 178_956_970
MAX_DOWNLOAD = 512 * 2**20  # bytes
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
SHORTEST_BASE64 = 48  # the smallest whole image files have about 35 bytes
LONGEST_NAME, LONGEST_REASON = 140, 100  # characters, so that a message stays under 300
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Any) -> Image.Image:
    """Open a picture.

    Args:
        source: path, http(s) URL, base64 data URI, base64 string, bytes, open file, PIL image, or a row of `datasets`
            with `bytes` or `path`.

    Returns:
        Upright RGB image; of an animation the first frame. Transparency is dropped, not composited.

    Raises:
        ValueError: one line naming the source, for anything that is not a whole picture of sane size.
        OSError: one line naming the source, when a URL cannot be fetched or a file may not be read.
    """
    if isinstance(source, Image.Image):
        return to_upright_rgb(source)
    data, name = _read(source)
    if not data:
        raise ValueError(f"{name}: the file is empty.")
    with _refuse_parts_of_pictures():
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            raise ValueError(f"{name}: not an image that can be read.") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{name}: too many pixels ({_one_line(error)}).") from None
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise ValueError(f"{name}: damaged image ({_one_line(error)}).") from error
    return _decode(image, name)


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a PIL image of any mode, rotated upright as its EXIF data say.

    Raises:
        ValueError: when its file turns out to be damaged, truncated or too large.
    """
    return _decode(image, _shown(str(getattr(image, "filename", "") or "PIL image")))


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise ValueError(f"{name}: an image of {image.width} x {image.height} pixels has nothing to look at.")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{name}: {image.width} x {image.height} is more than {MAX_PIXELS:,} pixels.")
    with _refuse_parts_of_pictures():
        try:
            data = _undecoded(image)
            image.load()
            if data is not None and (what := missing_part(data, image)) is not None:
                raise ValueError(what)
            image = _upright(image)
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                image = _to_eight_bits(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            elif image.mode == "La":  # Pillow has no direct way from here to RGB
                image = image.convert("LA")
            return image if image.mode == "RGB" else image.convert("RGB")
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise ValueError(f"{name}: damaged or truncated image ({_one_line(error)}).") from error


def _undecoded(image: Image.Image) -> bytes | None:
    """The file of a picture that is not decoded yet; None where that cannot be known any more."""
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO", "PNG") or file is None or getattr(file, "closed", False):
        return None
    try:
        place = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(place)
    except (OSError, ValueError, AttributeError):
        return None
    return data if isinstance(data, bytes) else None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; data that make no sense turn nothing, as in every viewer."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 0))
    except Exception:  # noqa: BLE001 Pillow raises nearly anything on damaged EXIF data
        return image
    return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _refuse_parts_of_pictures() -> Iterator[None]:
    """Undo `ImageFile.LOAD_TRUNCATED_IMAGES`, which other libraries set and which turns cut files half gray."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale deep levels to 8 bits; Pillow's own conversion would clip everything above 255 to white.

    16-bit modes reach to 65535. The modes I (32-bit integers) and F (floats) do not say how far they reach: F is taken
    as 0..1 when nothing is above 1, both as 0..255 or 0..65535 when nothing is above that, else to the highest level.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    reaches = [65_535] if image.mode.startswith("I;16") else [255, 65_535]
    if image.mode == "F":
        reaches.insert(0, 1)
    highest = values.max()
    white = next((reach for reach in reaches if highest <= reach), highest)
    return Image.fromarray(np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8))


def _read(source: Any) -> tuple[bytes, str]:
    """Bytes of a source and a name for messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), "image bytes"
    if isinstance(source, dict):
        return _read_row(source)
    if callable(getattr(source, "read", None)):
        return _read_file(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            "An image must be a path, URL, base64 string, bytes, open file, array or PIL image, got "
            f"{type(source).__name__}."
        )
    text = os.fsdecode(source)
    name = _shown(text)
    if text.lower().startswith(("http://", "https://")):
        return _download(text, name), name
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        if not header.endswith(";base64"):
            raise ValueError(f"{name}: only base64 data URIs can be read.")
        return _decode_base64(payload, "data URI")
    if os.path.isdir(text):
        raise ValueError(f"{name}: is a folder, not an image.")
    if os.path.isfile(text):
        with open(text, "rb") as file:
            return file.read(), name
    if os.path.exists(text):  # a pipe or a device would be read for ever
        raise ValueError(f"{name}: is not a regular file.")
    if len(text) >= SHORTEST_BASE64 and os.path.splitext(text)[1] == "":
        return _decode_base64(text, "base64 string")
    raise ValueError(f"{name}: no such file.")


def _read_row(row: dict) -> tuple[bytes, str]:
    """An undecoded picture of `datasets`: its bytes, or else its path."""
    name = row.get("path")
    if row.get("bytes") is not None:
        return bytes(row["bytes"]), _shown(str(name)) if name else "image bytes"
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"An image as a dictionary needs bytes or a path, got {sorted(map(str, row))[:5]}.")
    return _read(name)


def _read_file(file: Any) -> tuple[bytes, str]:
    """All of an open file, from its beginning where it can be rewound."""
    name = getattr(file, "name", None)
    name = _shown(name) if isinstance(name, str) else f"open file ({type(file).__name__})"
    try:
        if callable(getattr(file, "seek", None)) and getattr(file, "seekable", lambda: True)():
            file.seek(0)
        data = file.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read ({_one_line(error)}).") from error
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError(f"{name}: is open as text; open it in binary mode.")
    return bytes(data), name


def _download(url: str, name: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "fusedvlm"}), timeout=DOWNLOAD_TIMEOUT) as response:
            data = response.read(MAX_DOWNLOAD + 1)
    except ValueError as error:
        raise ValueError(f"{name}: not a URL that can be opened ({_one_line(error)}).") from error
    except Exception as error:  # HTTP's own errors are not all of type OSError
        raise OSError(f"{name}: cannot be fetched ({_one_line(error)}).") from error
    if len(data) > MAX_DOWNLOAD:
        raise ValueError(f"{name}: more than {MAX_DOWNLOAD:,} bytes.")
    return data


def _decode_base64(text: str, kind: str) -> tuple[bytes, str]:
    """Bytes of base64 text, which may be broken into lines, and a name for messages."""
    compact = "".join(text.split())
    name = f"{kind} {compact[:40]}..."
    try:
        return base64.b64decode(compact, validate=True), name
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}: neither an existing file nor valid base64.") from None


def _shown(text: str) -> str:
    """A source as messages name it: one line, not too long, and never without its end, where a file has its name."""
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= LONGEST_NAME else f"{text[:37]}...{text[40 - LONGEST_NAME :]}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def fetch_images(sources: Any) -> Any:
    """Load every source of a possibly nested list; arrays, tensors and PIL images pass through.

    Raises:
        ValueError, OSError: as `load_image`; also for things that are no image.
    """
    if isinstance(sources, (list, tuple)):
        return [fetch_images(source) for source in sources]
    if isinstance(sources, Image.Image):
        return sources
    if hasattr(sources, "__array__") and not isinstance(sources, (np.ndarray, torch.Tensor)):
        sources = np.asarray(sources)  # an array of another library
    if not isinstance(sources, (np.ndarray, torch.Tensor)):
        return load_image(sources)
    if sources.ndim not in (2, 3, 4):
        raise ValueError(f"An array is an image of 2 or 3 axes or a batch of 4, got shape {tuple(sources.shape)}.")
    return sources[None] if sources.ndim == 2 else sources

"""Load any picture a person may hand over as upright 8-bit RGB, or say in one line why not."""

import base64
import binascii
import io
import os
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pictures above this are refused before decoding: 179 megapixels is where Pillow itself speaks of a decompression bomb.
MAX_PIXELS = 178_956_970
DOWNLOAD_TIMEOUT = 30  # seconds


def load_image(source) -> Image.Image:
    """Open a picture.

    Args:
        source: path, http(s) URL, data URI, base64 string, bytes, or PIL image.

    Returns:
        Upright RGB image; of an animation the first frame. Transparency is dropped, not composited (reference 1.1).

    Raises:
        ValueError: one line naming the source, for anything that is not a whole picture of sane size.
        OSError: when a URL cannot be reached.
    """
    if isinstance(source, Image.Image):
        return to_upright_rgb(source)
    data, name = _read(source)
    if not data:
        raise ValueError(f"{name}: the file is empty.")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that can be read.") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: the image has more than {MAX_PIXELS:,} pixels.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: damaged image ({error}).") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{name}: {image.width} x {image.height} is more than {MAX_PIXELS:,} pixels.")
    try:
        image.load()
        return to_upright_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{name}: damaged or truncated image ({error}).") from None


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a PIL image of any mode, rotated upright as its EXIF data say."""
    if image.width < 1 or image.height < 1:
        raise ValueError(f"An image of {image.width} x {image.height} pixels has nothing to look at.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit levels to 8 bits; Pillow's own conversion would clip everything above 255 to white.

    32-bit integers hold 16-bit levels (that is how Pillow opens such PNG files) unless they go beyond; floats are taken
    as 0..1 unless they go beyond 1.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F" and values.max(initial=0) <= 1:
        values = values * 255
    elif image.mode != "F" and (image.mode != "I" or values.max(initial=0) > 255):
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), mode="L")


def _read(source) -> tuple[bytes, str]:
    """Bytes of a source and a name for messages."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source), "image bytes"
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    if text is None:
        raise ValueError(
            f"An image must be a path, URL, base64 string, bytes or PIL image, got {type(source).__name__}."
        )
    if urlparse(text).scheme in ("http", "https"):
        request = Request(text, headers={"User-Agent": "fusedvlm"})
        with urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read(), text
    if text.startswith("data:image/"):
        return _decode_base64(text.split(",", 1)[-1], "data URI")
    if os.path.isdir(text):
        raise ValueError(f"{text}: is a folder, not an image.")
    if os.path.exists(text):
        with open(text, "rb") as file:
            return file.read(), text
    if len(text) > 64 and len(text) % 4 == 0 and os.path.splitext(text)[1] == "":
        return _decode_base64(text, "base64 string")
    raise ValueError(f"{text[:200]}: no such file.")


def _decode_base64(text: str, name: str) -> tuple[bytes, str]:
    try:
        return base64.b64decode(text, validate=True), name
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} {text[:40]}...: neither an existing file nor valid base64.") from None


def fetch_images(sources):
    """Load every string, path or bytes of a possibly nested list; arrays, tensors and PIL images pass through."""
    if isinstance(sources, (list, tuple)):
        return [fetch_images(source) for source in sources]
    if isinstance(sources, (str, bytes, bytearray, os.PathLike)):
        return load_image(sources)
    return sources

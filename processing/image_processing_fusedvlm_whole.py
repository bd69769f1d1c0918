"""Is a picture's file whole? For the two formats that Pillow decodes without a word when the pixels end early.

A JPEG whose data stop early but which has an end marker is filled up with gray (or stays blurred, when progressive); a
PNG whose compressed stream ends properly after too few rows is filled up with black. Neither is an error for Pillow.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # anything but stuffed bytes and restarts
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
SCAN, END = 0xDA, 0xD9
ZEROS_AT_END = 64  # a file that was allocated but not filled
# What a decoder that runs out of data would read next; a whole picture never reads it.
FILLER = bytes(np.random.default_rng(0).integers(1, 255, 512, dtype=np.uint8))
# Sequential pictures above this are decoded a second time only when their last pixel is the gray of missing data.
SMALL = 2**17  # pixels


def missing_part(data: bytes, picture: Image.Image) -> str | None:
    """What is missing of a JPEG or PNG file, None for whole files and other formats.

    Args:
        data: the file.
        picture: decoded from it, as Pillow has it: before any rotation or conversion.
    """
    if picture.format in ("JPEG", "MPO"):
        return _missing_of_jpeg(data, picture)
    return _missing_of_png(data, picture) if picture.format == "PNG" else None


# -- JPEG ------------------------------------------------------------------------------------------------------------


@dataclass
class JpegLayout:
    """Markers of the first picture in a file: its frame, what each scan brought, and where the last one ends."""

    is_progressive: bool = False
    components: list[int] = field(default_factory=list)
    precision: dict[int, list[int | None]] = field(default_factory=dict)  # component -> 64 bits still to come, or None
    last_scan: tuple[int, int] = (0, 0)
    has_end: bool = False


def read_jpeg_layout(data: bytes) -> JpegLayout:
    """Walk over a JPEG's markers. Raises `ValueError` or `IndexError` where they make no sense."""
    layout, place = JpegLayout(), 2
    while (match := MARKER.search(data, place)) is not None:
        marker, place = match[1][0], match.end()
        if marker == END:
            layout.has_end = True
            break
        if marker in (0x01, 0xD8):
            continue
        length = int.from_bytes(data[place : place + 2], "big")
        segment = data[place + 2 : place + length]
        if len(segment) != length - 2:
            raise ValueError("a segment is cut")
        place += length
        if marker in FRAMES and not layout.components:
            layout.is_progressive = marker in PROGRESSIVE
            layout.components = [segment[6 + 3 * number] for number in range(segment[5])]
            layout.precision = {component: [None] * 64 for component in layout.components}
        elif marker == SCAN:
            _note_scan(layout, segment)
            following = MARKER.search(data, place)
            layout.last_scan = (place, following.start() if following else len(data))
            place = layout.last_scan[1]
    return layout


def _note_scan(layout: JpegLayout, segment: bytes) -> None:
    count = segment[0]
    first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
    if not layout.is_progressive:
        first, last, bits = 0, 63, 0
    for component in segment[1 : 1 + 2 * count : 2]:
        layout.precision[component][first : last + 1] = [bits & 15] * (last + 1 - first)


def _missing_of_jpeg(data: bytes, picture: Image.Image) -> str | None:
    try:
        layout = read_jpeg_layout(data)
    except (ValueError, IndexError, KeyError):
        return "its markers make no sense"
    if any(bits != 0 for component in layout.precision.values() for bits in component):
        return "it ends before the last scan"
    if not layout.has_end and data.endswith(bytes(ZEROS_AT_END)):
        return "it ends in zeros"
    is_small = picture.width * picture.height <= SMALL
    if not layout.is_progressive and not is_small and not _ends_in_gray(picture):
        return None
    start, stop = layout.last_scan
    # At a restart, a decoder skips everything up to the marker that it expects.
    restart = bytes([0xFF, 0xD0 + len(RESTART.findall(data, start, stop)) % 8])
    longer = data[:stop] + FILLER + restart + FILLER + data[stop:]
    try:
        with Image.open(io.BytesIO(longer)) as other:
            if other.size != picture.size or other.mode != picture.mode:
                return None  # decoded at another scale
            same = np.array_equal(np.asarray(picture), np.asarray(other))
    except (OSError, ValueError, SyntaxError):
        same = False
    return None if same else "its data end early"


def _ends_in_gray(picture: Image.Image) -> bool:
    last = picture.getpixel((picture.width - 1, picture.height - 1))
    return all(level in (127, 128) for level in (last if isinstance(last, tuple) else (last,)))


# -- PNG -------------------------------------------------------------------------------------------------------------

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples per pixel
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _missing_of_png(data: bytes, picture: Image.Image) -> str | None:
    try:
        width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
        bits = depth * CHANNELS[color]
    except (struct.error, KeyError):
        return None
    if not interlaced and np.asarray(picture.crop((0, height - 1, width, height))).any():
        return None  # the last row is there
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    expected = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        expected += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return None if _inflated_size(data, expected) >= expected else "its data end early"


def _inflated_size(data: bytes, enough: int) -> int:
    """Bytes that a PNG's compressed stream holds, counted up to `enough`."""
    stream, size, place = zlib.decompressobj(), 0, 8
    while place + 8 <= len(data) and size < enough:
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        while chunk and size < enough:
            size += len(stream.decompress(chunk, 2**20))
            chunk = stream.unconsumed_tail
        place += 12 + length
    return size

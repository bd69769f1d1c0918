"""Whatever a user hands over becomes upright RGB, or one clear line."""

import base64
import http.server
import io
import os
import socket
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.tests import tiny


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "picture.png"
    tiny.picture(0).save(path)
    return path


def test_path_bytes_base64_and_url_are_the_same_picture(png):
    expected = np.asarray(tiny.picture(0))
    data = png.read_bytes()
    encoded = base64.b64encode(data).decode()
    in_lines = base64.encodebytes(data).decode()
    uris = [
        f"data:{kind};base64,{text}"
        for kind in ("image/png", "application/octet-stream")
        for text in (encoded, in_lines)
    ]
    for source in (str(png), png, data, bytearray(data), encoded, in_lines, *uris, Image.open(png)):
        assert np.array_equal(np.asarray(load_image(source)), expected)


def test_url(png):
    handler = type(
        "Handler",
        (http.server.SimpleHTTPRequestHandler,),
        {
            "__init__": lambda self, *args: http.server.SimpleHTTPRequestHandler.__init__(
                self, *args, directory=str(png.parent)
            ),
            "log_message": lambda self, *args: None,
        },
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(load_image(f"{address}/picture.png")), np.asarray(tiny.picture(0)))
        with pytest.raises(OSError, match=r"other\.png: cannot be fetched .*404"):
            load_image(f"{address}/other.png")
        server.shutdown()


def bomb(path, width=30_000, height=30_000):
    """A PNG that is only a header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "bomb", "folder", "number", "base64"])
def test_bad_input_is_one_line_that_names_it(kind, tmp_path, png):
    path = tmp_path / f"{kind}.png"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "truncated":
        path.write_bytes(png.read_bytes()[:-60])
    elif kind == "bomb":
        bomb(path)
    elif kind == "folder":
        path.mkdir()
    source = {"number": 3, "base64": "A" * 64 + "!!!!"}.get(kind, str(path))
    with pytest.raises(ValueError) as error:
        load_image(source)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    assert {"number": "int", "base64": "base64"}.get(kind, str(path)) in message


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_truncated_jpeg_is_never_a_half_gray_picture(tmp_path, cut):
    path = tmp_path / "photo.jpg"
    tiny.picture(0, 400, 300).save(path, quality=90)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(ValueError, match=r"photo\.jpg"):
        load_image(str(path))


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:10] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = load_image(str(tmp_path / "turned.png"))
    assert image.size == (20, 30)
    assert image.getpixel((19, 5)) == (255, 0, 0)
    assert image.getpixel((0, 5)) == (0, 0, 0)


def test_modes(tmp_path):
    colour = Image.new("RGB", (8, 6), (200, 100, 50))
    transparent = Image.new("RGBA", (8, 6), (200, 100, 50, 0))
    palette = colour.quantize(4)
    palette.info["transparency"] = 0
    cases = {
        "cmyk.jpg": colour.convert("CMYK"),
        "rgba.png": transparent,
        "palette.png": palette,
        "gray.png": colour.convert("L"),
        "bits.png": colour.convert("1"),
        "la.png": colour.convert("LA"),
    }
    for name, image in cases.items():
        image.save(tmp_path / name)
        loaded = load_image(str(tmp_path / name))
        assert loaded.mode == "RGB"
        assert loaded.size == (8, 6)
    assert load_image(str(tmp_path / "rgba.png")).getpixel((0, 0)) == (200, 100, 50)  # alpha dropped, not composited
    near = np.array(load_image(str(tmp_path / "cmyk.jpg")).getpixel((4, 3)), dtype=int)
    assert np.abs(near - (200, 100, 50)).max() <= 4


def test_sixteen_bit_levels_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    loaded = np.asarray(load_image(str(tmp_path / "deep.png")))
    assert loaded[0, :, 0].tolist() == [0, 1, 100, 255]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(str(tmp_path / "moving.gif")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/x.png", "http://", "http://[bad", "http://127.0.0.1/a b.png"])
def test_urls_that_lead_nowhere_are_named(url):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = url.format(port=free.getsockname()[1])
        with pytest.raises((ValueError, OSError)) as error:  # bound, but nobody listens
            load_image(url)
    assert url in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipe_is_refused_instead_of_read_for_ever(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        load_image(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["", "two\nlines.png", "nul\0.png", "x" * 5000 + ".png"])
def test_odd_names_stay_one_short_line(name):
    with pytest.raises(ValueError, match="no such file") as error:
        load_image(name)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


@pytest.fixture
def lenient_pillow(monkeypatch):
    """Other libraries switch this on for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Image.open(io.BytesIO(data))], ids=["bytes", "PIL"])
def test_truncation_is_seen_when_pillow_was_told_to_overlook_it(wrap, png, lenient_pillow):
    tiny.picture(0, 100, 100).save(png)
    data = png.read_bytes()
    with pytest.raises(ValueError, match="truncated"):
        load_image(wrap(data[: len(data) // 2]))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


FORMATS = {
    "PNG": {}, "JPEG": {"quality": 90}, "GIF": {}, "BMP": {}, "WEBP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_or_read_whole(name):
    """Every cut gives the whole picture (only trailing bytes were lost) or one line; flipped bytes never anything else."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    kwargs = {"exif": exif} if name in ("PNG", "JPEG", "WEBP") else {}
    tiny.picture(0, 60, 44).save(buffer, format=name, **FORMATS[name], **kwargs)
    data = buffer.getvalue()
    whole = np.asarray(load_image(data))
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow speaks of corrupt EXIF data
        for cut in np.linspace(1, len(data) - 1, 40).astype(int):
            picture = loaded_or_none(data[:cut])
            assert picture is None or np.array_equal(picture, whole)
        for place in rng.integers(len(data), size=60):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            loaded_or_none(bytes(damaged))


@pytest.mark.filterwarnings("ignore")  # Pillow speaks of corrupt EXIF data
@pytest.mark.parametrize("name", FORMATS)
def test_half_a_picture_is_refused_whatever_pillow_was_told(name, lenient_pillow):
    buffer = io.BytesIO()
    tiny.picture(0, 60, 44).save(buffer, format=name, **FORMATS[name])
    data = buffer.getvalue()
    with pytest.raises(ValueError, match=r"damaged|truncated|not an image"):
        load_image(data[: len(data) // 2])


def loaded_or_none(data: bytes) -> np.ndarray | None:
    try:
        return np.asarray(load_image(data))
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    return None


@pytest.mark.parametrize("guard", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("lazy", [False, True])
def test_bombs_are_refused_before_decoding_whatever_pillow_was_told(guard, lazy, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    bomb(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None if lazy else guard)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"bomb\.png.*pixels"):
        load_image(Image.open(path) if lazy else str(path))


def test_large_pictures_pass_unless_warnings_are_errors(tmp_path):
    path = tmp_path / "large.png"
    bomb(path, 10_000, 10_000)  # Pillow only warns; without content it is truncated, so it was not refused for its size
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="truncated"):
        load_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="too many pixels"):
            load_image(path)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[0, 7, 255]], dtype=np.int32), [0, 7, 255]),
        (np.array([[-5, 25_700, 65_535]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 7.4, 255]], dtype=np.float32), [0, 7, 255]),
        (np.array([[0, 25_700, 65_535]], dtype=np.float32), [0, 100, 255]),
        (np.array([[0, 257, 300]], dtype=np.uint16), [0, 1, 1]),
    ],
    ids=["I 8 bit", "I 16 bit", "I 32 bit", "F 0..1", "F 8 bit", "F 16 bit", "dark I;16"],
)
def test_deep_levels(levels, expected):
    assert np.asarray(load_image(Image.fromarray(levels)))[0, :, 1].tolist() == expected


def test_levels_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        load_image(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA", "RGBX", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    steps = {"La": ["LA", "La"], "RGBa": ["RGBA", "RGBa"], "PA": ["P", "PA"]}.get(mode, [mode])
    image = Image.new("RGB", (8, 6), (200, 100, 50))
    if mode == "LAB":
        image = Image.new("LAB", (8, 6), (124, 128, 128))  # lightness 48.6 of 100, no colour
    else:
        for step in steps:
            image = image.convert(step)
    red, green, blue = load_image(image).getpixel((3, 3))
    expected = {"LA": (124,) * 3, "La": (124,) * 3, "LAB": (115,) * 3}.get(mode, (200, 100, 50))
    assert max(abs(got - want) for got, want in zip((red, green, blue), expected, strict=True)) <= 6

"""Whatever a person hands over becomes upright RGB, or one clear line."""

import base64
import http.server
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

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
    for source in (str(png), png, data, encoded, f"data:image/png;base64,{encoded}"):
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
        with pytest.raises(OSError, match="404"):
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
def test_truncated_jpeg_is_never_a_half_grey_picture(tmp_path, cut):
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
        "grey.png": colour.convert("L"),
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

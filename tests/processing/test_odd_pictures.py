"""Pictures that decoders fill up without a word, arrays of every kind, and what is said about them."""

import io
import struct
import tempfile
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMImageProcessorPil
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.processing.image_processing_fusedvlm_whole import SMALL, missing_part
from fusedvlm.tests import tiny

BACKENDS = [FusedVLMImageProcessor, FusedVLMImageProcessorPil]
SIZE = {"size": {"height": 24, "width": 24}, "max_local_views": 1}
JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "restarts in rows": {"restart_marker_blocks": 3},
    "full chroma": {"subsampling": 0},
    "optimized": {"optimize": True},
    "progressive, restarts": {"progressive": True, "restart_marker_rows": 1},
}
MODES = ("RGB", "L", "CMYK")


def photo(width=200, height=150, seed=0) -> Image.Image:
    """Smooth, with some grain: compresses as photographs do."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(rows + number) + np.cos(columns * (number + 1)) for number in range(3)], -1)
    return Image.fromarray((128 + 50 * waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 300
    return message


# -- files that end early ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_ends_early_with_an_end_marker_is_refused_at_every_cut(kind, mode):
    data = encoded(photo().convert(mode), quality=85, **JPEGS[kind])
    load_image(data)
    scan = data.index(b"\xff\xda") + 14
    for cut in np.linspace(scan, len(data) - 60, 12).astype(int):
        assert "image" in refusal(load_image, data[:cut] + b"\xff\xd9")
        refusal(load_image, Image.open(io.BytesIO(data[:cut] + b"\xff\xd9")))


def test_large_jpegs_too():
    image = photo(1300, 900)
    assert image.width * image.height > SMALL
    data = encoded(image, quality=80)
    load_image(data)
    for share in (0.3, 0.9, 0.99):
        refusal(load_image, data[: int(len(data) * share)] + b"\xff\xd9")


def test_a_jpeg_that_is_zeros_from_some_place_on_is_refused():
    data = encoded(photo(), quality=85)
    for share in (0.3, 0.7):
        cut = int(len(data) * share)
        refusal(load_image, data[:cut] + bytes(len(data) - cut))
        refusal(load_image, data[:cut] + bytes(20 * len(data)))


@pytest.mark.parametrize("color", [(128, 128, 128), (0, 0, 0), (255, 255, 255), (127, 128, 129)])
@pytest.mark.parametrize("kind", JPEGS)
def test_plain_jpegs_are_whole(kind, color):
    for size in ((200, 150), (8, 8), (1, 1), (17, 3)):
        loaded = load_image(encoded(Image.new("RGB", size, color), **JPEGS[kind]))
        assert np.abs(np.asarray(loaded).astype(int) - color).max() <= 2


def test_whole_jpegs_with_trailing_bytes_thumbnails_and_second_pictures_load():
    data, second = encoded(photo(), quality=85), encoded(photo(seed=1), quality=85)
    expected = np.asarray(load_image(data))
    comment = data[:2] + b"\xff\xe1" + struct.pack(">H", len(second) + 2) + second + data[2:]
    for variation in (data + b"trailing", data + second, comment, data + bytes(1000)):
        assert np.array_equal(np.asarray(load_image(variation)), expected)
    several = encoded(photo(), "MPO", save_all=True, append_images=[photo(seed=1)])
    assert load_image(several).size == (200, 150)


def png(rows: int, declared: int = 40, interlaced: bool = False, **_) -> bytes:
    """A PNG of which only `rows` of the declared rows are there, in a stream that ends properly."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = np.random.default_rng(0).integers(1, 256, (rows, 30, 3), dtype=np.uint8)
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    header = struct.pack(">IIBBBBB", 30, declared, 8, 2, 0, 0, int(interlaced))
    parts = [chunk(b"IDAT", stream[start : start + 100]) for start in range(0, len(stream), 100)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IEND", b"")


def test_a_png_with_too_few_rows_is_refused():
    assert load_image(png(40)).size == (30, 40)
    for rows in (1, 20, 39):
        refusal(load_image, png(rows))
    refusal(load_image, png(10, interlaced=True))


def test_pngs_that_end_in_black_are_whole():
    pixels = np.zeros((20, 31, 4), np.uint8)
    pixels[:3] = 200
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels)
        load_image(encoded(image if mode == "I;16" else image.convert(mode), "PNG"))


def test_an_interlaced_png_is_counted_pass_by_pass():
    """Pillow writes none, so the passes of a 5 x 7 picture are written by hand."""
    width, height = 5, 7
    pixels = np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    lines = [row for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if len(row)]

    def file(lines):
        def chunk(kind, content):
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in lines))
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")

    assert np.array_equal(np.asarray(load_image(file(lines)))[..., 0], pixels)
    refusal(load_image, file(lines[:-1]))


def test_formats_that_say_it_themselves_are_not_looked_at():
    picture = Image.open(io.BytesIO(encoded(photo(), "WEBP")))
    picture.load()
    assert missing_part(b"", picture) is None


# -- EXIF --------------------------------------------------------------------------------------------------------------


def exif_bytes(orientation: bytes, rest: bytes = b"") -> bytes:
    """One entry, the orientation, as 12 raw bytes; `rest` is whatever follows."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + orientation + b"\0\0\0\0" + rest


TURN_6 = struct.pack("<HHII", 0x0112, 3, 1, 6)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + TURN_6,
        exif_bytes(struct.pack("<HHII", 0x0112, 2, 1, 6)),
        exif_bytes(struct.pack("<HHII", 0x0112, 3, 2, 0x00060006)),
        exif_bytes(struct.pack("<HHII", 0x0112, 5, 1, 0xFFFFFF)),
        exif_bytes(struct.pack("<HHII", 0x0112, 3, 1, 77)),
    ],
    ids=["garbage", "empty", "far", "too many", "text", "two values", "rational outside", "77"],
)
def test_malformed_exif_in_a_readable_jpeg_loads(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow speaks of corrupt EXIF data
        assert load_image(encoded(photo(60, 40), exif=exif)).size in ((60, 40), (40, 60))


def test_a_valid_orientation_counts_beside_a_tag_that_cannot_be_written_again():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + TURN_6 + struct.pack("<HHII", 0x8769, 3, 1, 9) + b"\0\0\0\0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(encoded(photo(60, 40), exif=exif)).size == (40, 60)


# -- where pictures come from ------------------------------------------------------------------------------------------


def test_open_files_and_rows_of_datasets_load(tmp_path):
    data, expected = encoded(photo(), "PNG"), np.asarray(photo())
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    read_to_its_end = io.BytesIO(data)
    read_to_its_end.read()
    spooled = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    spooled.write(data)
    rows = [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": data, "path": "gone.png"}]
    with path.open("rb") as file, spooled:
        for source in (io.BytesIO(data), read_to_its_end, file, spooled, memoryview(data), *rows):
            assert np.array_equal(np.asarray(load_image(source)), expected)
    processor = FusedVLMImageProcessor(**SIZE)
    assert len(processor(processor.fetch_images([io.BytesIO(data), rows[1]]))["image_num_views"]) == 2


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (None, "NoneType"),
        (3.5, "float"),
        (object(), "object"),
        ({}, "bytes or a path"),
        ({"url": 3}, "bytes or a path"),
        (io.StringIO("text"), "binary"),
        (io.BytesIO(), "empty"),
        ({"bytes": b"", "path": "empty.png"}, "empty.png"),
    ],
)
def test_what_is_no_picture_is_named(source, word):
    assert word in refusal(load_image, source)
    assert word in refusal(FusedVLMImageProcessor(**SIZE).fetch_images, [source])


@pytest.mark.parametrize("folder", ["short", "x" * 250 + "/" + "y" * 250])
def test_messages_keep_the_name_of_the_file_and_stay_short(folder, tmp_path):
    directory = tmp_path / folder
    directory.mkdir(parents=True)
    path = directory / "the_photo_we_look_for.jpg"
    for content in (b"", b"no picture", encoded(photo())[:500], encoded(photo())[:700] + b"\xff\xd9"):
        path.write_bytes(content)
        assert "the_photo_we_look_for.jpg" in refusal(load_image, path)
    path.unlink()
    assert "the_photo_we_look_for.jpg" in refusal(load_image, path)


# -- arrays ------------------------------------------------------------------------------------------------------------


def views(backend, image, **kwargs):
    return backend(**SIZE)(image, return_tensors="pt", **kwargs)["pixel_values"]


PIXELS = np.asarray(tiny.picture(3, 40, 30))
ALPHA = np.full((30, 40, 1), 7, np.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "image",
    [
        np.ascontiguousarray(PIXELS[::-1])[::-1],
        np.ascontiguousarray(PIXELS[:, ::-1])[:, ::-1],
        PIXELS.transpose(2, 0, 1),
        np.ascontiguousarray(PIXELS[..., ::-1])[..., ::-1],
        PIXELS.astype(">i4"),
        PIXELS.astype(">f4"),
        PIXELS.astype(np.float64),
        np.asfortranarray(PIXELS),
        np.concatenate([PIXELS, ALPHA], -1),
        np.concatenate([PIXELS, ALPHA], -1).transpose(2, 0, 1),
        torch.from_numpy(PIXELS.copy()),
        torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
        torch.from_numpy(np.concatenate([PIXELS, ALPHA], -1)),
        torch.from_numpy(PIXELS.astype(np.float32)).requires_grad_(),
        Image.fromarray(np.concatenate([PIXELS, ALPHA], -1)),
    ],
    ids=["rows backwards", "columns backwards", "channels first", "channels backwards", "big-endian", "big-endian floats",
         "doubles", "fortran", "RGBA", "RGBA first", "tensor", "tensor first", "RGBA tensor", "gradient", "RGBA picture"],
)  # fmt: skip
def test_every_layout_of_the_same_pixels_is_the_same_picture(image, backend):
    assert torch.equal(views(backend, image), views(backend, Image.fromarray(PIXELS))) or torch.allclose(
        views(backend, image), views(backend, PIXELS.astype(np.float32)), atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gray_arrays_are_like_gray_pictures(backend):
    gray = PIXELS[..., 0]
    expected = views(backend, Image.fromarray(gray))
    for image in (gray, gray[..., None], gray[None], np.stack([gray, gray // 2], -1), torch.from_numpy(gray.copy())):
        assert torch.equal(views(backend, image), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("image", "word"),
    [
        (PIXELS.astype(complex), "complex"),
        (PIXELS.astype(object), "object"),
        (PIXELS.astype(str), "type"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "complex"),
        (torch.zeros(3, 8, 8, device="meta"), "meta"),
        (PIXELS / 127.5 - 1, "0..255"),
        (PIXELS * 1e30, "0..255"),
        (PIXELS.astype(np.float32) - 300, "0..255"),
        (PIXELS.astype(np.float32) * 257, "0..255"),
        (np.full((8, 8, 3), np.nan), "finite"),
        (np.full((8, 8, 3), np.inf), "finite"),
        (PIXELS.astype(np.int32) - 1000, "0..255"),
        (PIXELS.astype(np.uint16) * 257, "257"),
        (np.zeros((8, 8, 5), np.uint8), "channels"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.zeros(8, np.uint8), "axes"),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), "axes"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(image, word, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert word in refusal(views, backend, image)


@pytest.mark.parametrize("backend", BACKENDS)
def test_floats_of_0_to_1_warn_with_the_fix(backend):
    image = PIXELS.astype(np.float32) / 255
    with pytest.warns(UserWarning, match="do_rescale=False"):
        views(backend, image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = views(backend, image, do_rescale=False)
        views(backend, np.zeros((8, 8, 3), np.float32))
        whole = views(backend, PIXELS.astype(np.float32))
    assert torch.allclose(scaled, whole, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_are_compared_with_the_options(backend):
    assert "0..1" in refusal(views, backend, PIXELS.astype(np.float32), do_rescale=False)
    assert "0..1" in refusal(views, backend, PIXELS.astype(np.float32) / 127.5 - 1, do_rescale=False)
    with pytest.warns(UserWarning, match="leave do_rescale on"):
        views(backend, PIXELS, do_rescale=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views(backend, PIXELS.astype(np.float32) / 127.5 - 1, do_rescale=False, do_normalize=False)

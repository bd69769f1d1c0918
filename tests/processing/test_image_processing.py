"""Pixels of both backends against the published ones, and against each other."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers.image_utils import PILImageResampling

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMImageProcessorPil
from fusedvlm.tests import tiny
from fusedvlm.tests.modeling_fusedvlm.oracle import FOLDER

CASES = json.loads((FOLDER / "e_images.json").read_text())["cases"]
BACKENDS = [FusedVLMImageProcessor, FusedVLMImageProcessorPil]
GRAY_LEVEL = 1 / 255 / 0.27577711  # one gray level after CLIP's normalization, narrowest channel
# Before release 13 Pillow shrinks tall pictures horizontally first; with 8 bits between the passes that is up to 12 gray
# levels in the global view. The reference was made with 13.
OTHER_ORDER = int(PIL.__version__.partition(".")[0]) < 13
PUBLISHED = [
    pytest.param(
        case,
        id=case["key"],
        marks=pytest.mark.skipif(
            OTHER_ORDER and case["height"] > max(336, 2 * case["width"]), reason="Pillow before 13 on a tall picture"
        ),
    )
    for case in CASES
]
FLOAT16 = 2e-3  # the reference samples are stored in half precision


def synthetic(width: int, height: int, kind: str) -> Image.Image:
    """The formulas of the reference images."""
    x, y = np.arange(width)[None, :].astype(np.int64), np.arange(height)[:, None].astype(np.int64)
    if kind == "smooth":
        channels = [
            (255 * x) // max(width - 1, 1) + 0 * y,
            (255 * y) // max(height - 1, 1) + 0 * x,
            (((x // 8) ^ (y // 8)) * 16) % 256,
        ]
    else:
        channels = [(3 * x * x + 5 * y * y + 7 * x * y + 85 * c) % 256 for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_pixels(backend, case):
    samples = np.load(FOLDER / "e_images.npz")
    image = synthetic(case["width"], case["height"], case["kind"])
    for global_view in ("padded_image", "canvas"):
        processor = backend(max_local_views=case["num_crops"], global_view=global_view)
        batch = processor(image, return_tensors="pt")
        assert batch["image_num_views"].tolist() == [case["num_views"]]
        grid = batch["pixel_values"][:, :, 14::28, 14::28].numpy()
        if global_view == "padded_image":
            expected = samples[case["key"] + "/sample"]
        else:
            grid, expected = grid[:1], samples[case["key"] + "/raw_global_sample"]
        assert np.abs(grid - expected.astype(np.float32)).max() <= FLOAT16 < GRAY_LEVEL


def gray_levels(backend, case: dict) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3) global square and canvas, put together again from the views."""
    processor = backend(max_local_views=case["num_crops"], do_normalize=False, do_rescale=False)
    image = synthetic(case["width"], case["height"], case["kind"])
    views = processor(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(views, np.rint(views))
    width, height = case["hd_padded_size_wh"]
    tiles = views[1:].reshape(height // 336, width // 336, 3, 336, 336)
    canvas = tiles.transpose(0, 3, 1, 4, 2).reshape(height, width, 3)
    return views[0].transpose(1, 2, 0).astype(np.uint8), canvas.astype(np.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_every_published_gray_level(backend, case):
    for pixels, key in zip(gray_levels(backend, case), ("global_u8_sha256_16", "hd_u8_sha256_16"), strict=True):
        assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16] == case[key]


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_pictures(backend):
    for pixels, name in zip(
        gray_levels(backend, CASES[0]),
        ("e_globalpad_640x480_smooth.png", "e_hd_640x480_smooth_nc9.png"),
        strict=True,
    ):
        assert np.array_equal(pixels, np.asarray(Image.open(FOLDER / name).convert("RGB")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_statistics_of_every_view(backend, case):
    processor = backend(max_local_views=case["num_crops"])
    image = synthetic(case["width"], case["height"], case["kind"])
    views = processor(image, return_tensors="np")["pixel_values"].astype(np.float64)
    for name in ("mean", "std"):
        assert np.abs(getattr(views, name)((2, 3)) - case["stats_views"][name]).max() < 1e-5


@pytest.mark.parametrize("size", [(640, 480), (37, 211), (300, 300), (1, 1), (500, 3)])
@pytest.mark.parametrize("tile", [24, 336])
def test_backends_agree(size, tile):
    image = tiny.picture(5, *size)
    batches = [
        backend(size={"height": tile, "width": tile}, max_local_views=5)(image, return_tensors="pt")
        for backend in BACKENDS
    ]
    assert batches[0]["image_num_views"].tolist() == batches[1]["image_num_views"].tolist()
    torch.testing.assert_close(batches[0]["pixel_values"], batches[1]["pixel_values"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_show_the_right_part_of_the_picture(backend):
    pixels = np.zeros((48, 72, 3), dtype=np.uint8)
    pixels[24:, 48:] = 255  # the last tile of a 3 x 2 canvas
    processor = backend(size={"height": 24, "width": 24}, max_local_views=6, do_normalize=False)
    views = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert views.shape[0] == 7
    assert [float(view.mean()) for view in views[1:]] == [0, 0, 0, 0, 0, 1]
    assert 0 < float(views[0].mean()) < 0.5
    assert float(views[0][:, :4].max()) == 0  # black bars above and below a landscape image


@pytest.mark.parametrize("backend", BACKENDS)
def test_white_padding_of_the_canvas(backend):
    processor = backend(size={"height": 24, "width": 24}, max_local_views=4, do_normalize=False)
    views = processor(Image.new("RGB", (48, 30)), return_tensors="pt")["pixel_values"]
    assert float(views[1][:, 8].min()) == 1.0
    assert float(views[1][:, 9:].max()) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_view_count_needs_no_pixels(backend):
    processor = backend(max_local_views=7)
    for size in ((640, 480), (10, 300), (5000, 1)):
        counted = processor.get_number_of_image_patches(size[1], size[0], {})
        assert counted == processor(Image.new("RGB", size), return_tensors="pt")["image_num_views"].item()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 17), st.sampled_from(BACKENDS))
def test_view_count_is_that_of_the_pixels_for_any_size(width, height, most, backend):
    processor = backend(max_local_views=most, size={"height": 4, "width": 4})
    batch = processor(Image.new("RGB", (width, height)), return_tensors="pt")
    counted = processor.get_number_of_views(height, width, {})
    assert batch["image_num_views"].tolist() == [counted]
    assert tuple(batch["pixel_values"].shape) == (counted, 3, 4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (1, 1)])
def test_thinnest_images_have_finite_views(backend, size):
    views = backend()(Image.new("RGB", size, (255, 0, 0)), return_tensors="pt")["pixel_values"]
    assert bool(views.isfinite().all())
    red = float(views[:, 0].max())
    assert red == pytest.approx((1 - 0.48145466) / 0.26862954, abs=0.3)  # bicubic overshoots next to the black bars


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_images_follow_each_other_with_the_global_view_first(backend):
    images = [tiny.picture(1, 40, 30), tiny.picture(2, 20, 60), tiny.picture(3, 5, 5)]
    processor = backend(size={"height": 12, "width": 12}, max_local_views=4)
    together = processor(images, return_tensors="pt")
    alone = [processor(image, return_tensors="pt") for image in images]
    assert together["image_num_views"].tolist() == [one["image_num_views"].item() for one in alone]
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_local_views": -1}, "max_local_views=-1"),
        ({"size": {"height": 24, "width": 36}}, "height=24, width=36"),
        ({"global_view": "corner"}, "corner"),
        ({"global_view": "canvas", "max_local_views": 0}, "max_local_views=0 has none"),
    ],
)
def test_wrong_options_are_refused(backend, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        backend(**kwargs)(tiny.picture(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_and_tensors_equal_the_picture(backend):
    image = tiny.picture(1)
    processor = backend(size={"height": 24, "width": 24}, max_local_views=2)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for other in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()).permute(2, 0, 1)):
        torch.testing.assert_close(processor(other, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
def test_whole_numbers_of_any_type_equal_bytes(backend, dtype):
    pixels = np.asarray(tiny.picture(1))
    processor = backend(size={"height": 24, "width": 24}, max_local_views=2)
    expected = processor(pixels, return_tensors="pt")["pixel_values"]
    for image in (pixels.astype(dtype), torch.from_numpy(pixels.astype(dtype)).permute(2, 0, 1)):
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), 65_535, dtype=np.uint16), r"65535\.\.65535; divide"),
        (np.full((8, 8, 3), -1, dtype=np.int32), "got -1"),
        (np.zeros((0, 10, 3), dtype=np.uint8), r"\(0, 10, 3\) has no pixels"),
        (torch.zeros(3, 5, 0), r"\(3, 5, 0\) has no pixels"),
        (np.full((8, 8, 3), np.nan, dtype=np.float32), "not finite"),
        (torch.full((3, 8, 8), torch.inf), "not finite"),
        ([], "no images"),
    ],
    ids=["deep", "negative", "empty array", "empty tensor", "not a number", "infinite", "none"],
)
def test_arrays_that_are_no_picture_are_refused(backend, image, message):
    with pytest.raises(ValueError, match=message):
        backend(max_local_views=1)(image)


def float_views(backend, image, **kwargs) -> torch.Tensor:
    processor = backend(size={"height": 24, "width": 24}, max_local_views=4, do_normalize=False)
    return processor(image, return_tensors="pt", **kwargs)["pixel_values"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_floats_stay_in_range_and_near_the_bytes(backend):
    pixels = np.asarray(tiny.picture(4, 60, 40))
    expected = float_views(backend, pixels)
    levels = (pixels / 255).astype(np.float32)
    for image in (
        levels,
        torch.from_numpy(levels).permute(2, 0, 1),
        torch.from_numpy(levels).double().permute(2, 0, 1),
    ):
        views = float_views(backend, image, do_rescale=False)
        assert views.dtype == torch.float32
        assert 0 <= float(views[1:].min()) <= float(views[1:].max()) <= 1
        tiles = (views - expected)[1:]
        assert float(tiles.abs().max()) <= 1 / 255  # not rounded where bytes are
        assert torch.allclose(views[0], expected[0], atol=1e-6)  # shrunk in 8 bits
    half = float_views(backend, torch.from_numpy(levels).to(torch.bfloat16).permute(2, 0, 1), do_rescale=False)
    assert float((half - expected).abs().mean()) < 3 / 255


def test_backends_agree_on_floats():
    image = np.random.default_rng(0).random((50, 90, 3), dtype=np.float32)
    views = [float_views(backend, image, do_rescale=False) for backend in BACKENDS]
    torch.testing.assert_close(*views, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("do_rescale", [True, False])
def test_padding_is_white_beside_a_black_picture_of_floats(backend, do_rescale):
    views = float_views(backend, np.zeros((30, 48, 3), dtype=np.float32), do_rescale=do_rescale)
    assert float(views[1:].max()) == pytest.approx(1.0)
    assert float(views[1:].min()) == 0.0


def test_large_squares_are_decimated_as_published():
    """Every second pixel of a fine chequerboard survives, while anything but a square is smoothed to gray."""
    board = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)
    kwargs = {"size": {"height": 32, "width": 32}, "max_local_views": 0, "do_normalize": False}
    image = Image.fromarray(board).convert("RGB")
    square = FusedVLMImageProcessorPil(**kwargs)(image, return_tensors="pt")["pixel_values"]
    wide = FusedVLMImageProcessorPil(**kwargs)(image.crop((0, 0, 96, 95)), return_tensors="pt")["pixel_values"]
    assert float(square.std()) > 0.4
    assert float(wide[0, :, 4:-4].std()) < 0.1


def test_tiles_resized_by_torchvision_are_within_one_gray_level():
    """The path of floats, and of tiles on accelerators."""
    image = torch.from_numpy(np.asarray(tiny.picture(2, 90, 50)).copy()).permute(2, 0, 1)
    for size in ((20, 36), (100, 180)):
        exact = FusedVLMImageProcessor._resize(image, size, PILImageResampling.BILINEAR).float()
        smooth = FusedVLMImageProcessor._resize(image.float(), size, PILImageResampling.BILINEAR)
        assert float((exact - smooth.round()).abs().max()) <= 1


WITHOUT_TORCHVISION = """
import sys
sys.modules["fusedvlm"] = sys.modules["torchvision"] = None  # importing them fails
import numpy as np
from transformers import AutoImageProcessor
folder, saved, out = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
processor.save_pretrained(saved)
again = AutoImageProcessor.from_pretrained(saved, trust_remote_code=True, backend="pil")
image = np.load(out + "/image.npy")
for name, loaded in (("first", processor), ("again", again)):
    assert type(loaded).__name__ == "FusedVLMImageProcessorPil", type(loaded)
    np.save(f"{out}/{name}.npy", loaded(image, return_tensors="np")["pixel_values"])
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_by_either_backend_it_loads_without_torchvision_and_this_package(backend, tmp_path):
    processor = backend(size={"height": 24, "width": 24}, max_local_views=5)
    processor.save_pretrained(tmp_path / "one")
    image = np.asarray(tiny.picture(3, 70, 40))
    np.save(tmp_path / "image.npy", image)
    paths = [str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHVISION, *paths],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    expected = processor(image, return_tensors="np")["pixel_values"]
    for name in ("first", "again"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=2e-6)

"""Pixels of both backends against the published ones, and against each other."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMImageProcessorPil
from fusedvlm.tests import tiny
from fusedvlm.tests.modeling_fusedvlm.oracle import FOLDER

CASES = json.loads((FOLDER / "e_images.json").read_text())["cases"]
BACKENDS = [FusedVLMImageProcessor, FusedVLMImageProcessorPil]
GREY_LEVEL = 1 / 255 / 0.27577711  # one grey level after CLIP's normalisation, narrowest channel
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
@pytest.mark.parametrize("case", CASES, ids=[case["key"] for case in CASES])
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
        assert np.abs(grid - expected.astype(np.float32)).max() <= FLOAT16 < GREY_LEVEL


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_local_views": -1}, "max_local_views=-1"),
        ({"size": {"height": 24, "width": 36}}, "height=24, width=36"),
        ({"global_view": "corner"}, "corner"),
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

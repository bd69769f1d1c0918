"""Every way a camera can be held: all eight EXIF orientations, mirrored ones included, as any source and in any format."""

import io

import numpy as np
import pytest
from PIL import Image

from fusedvlm.processing.image_processing_fusedvlm_loading import load_image, to_upright_rgb

ORIENTATION = 0x0112
# What the camera stored is the upright picture after the inverse of what the number asks for (EXIF 2.3, tag 0x0112).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],  # mirrored left to right
    3: lambda upright: upright[::-1, ::-1],  # upside down
    4: lambda upright: upright[::-1],  # mirrored top to bottom
    5: lambda upright: upright.transpose(1, 0, 2),  # mirrored along the main diagonal
    6: lambda upright: upright[:, ::-1].transpose(1, 0, 2),  # to be turned clockwise
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),  # mirrored along the other diagonal
    8: lambda upright: upright[::-1].transpose(1, 0, 2),  # to be turned anticlockwise
}


@pytest.fixture(scope="module")
def upright():
    """A picture without any symmetry: every block has a color of its own."""
    blocks = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 0], [0, 250, 250], [120, 60, 200]]])
    return np.ascontiguousarray(blocks.repeat(8, 0).repeat(8, 1).astype(np.uint8))


def encoded(pixels: np.ndarray, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format=kind, exif=exif, **options)
    return buffer.getvalue()


def test_the_table_of_orientations_is_its_own_inverse_of_the_standard(upright):
    """Row 0 and column 0 of what is stored are where the standard says they are."""
    # Orientation n: (where row 0 of the stored picture is in the upright one, where its column 0 is).
    sides = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }  # fmt: skip
    edge = {"top": upright[0], "bottom": upright[-1], "left": upright[:, 0], "right": upright[:, -1]}
    for number, (row, column) in sides.items():
        stored = STORED[number](upright)
        assert {tuple(pixel) for pixel in stored[0]} == {tuple(pixel) for pixel in edge[row]}, number
        assert {tuple(pixel) for pixel in stored[:, 0]} == {tuple(pixel) for pixel in edge[column]}, number


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_comes_upright(orientation, kind, upright, tmp_path):
    data = encoded(STORED[orientation](upright), orientation, kind)
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(data)
    for source in (data, path, Image.open(io.BytesIO(data))):
        shown = np.asarray(load_image(source)).astype(int)
        assert shown.shape == upright.shape
        assert np.abs(shown - upright).max() <= 6


@pytest.mark.parametrize("orientation", [2, 4, 5, 7])
def test_the_image_processor_sees_the_upright_picture(orientation, upright, processor):
    turned = Image.open(io.BytesIO(encoded(STORED[orientation](upright), orientation, "PNG")))
    assert np.array_equal(np.asarray(to_upright_rgb(turned)), upright)
    seen, expected = (
        processor.image_processor([image], return_tensors="np")["pixel_values"]
        for image in (turned, Image.fromarray(upright))
    )
    assert np.array_equal(seen, expected)

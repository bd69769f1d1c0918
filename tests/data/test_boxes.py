"""Boxes: exact there and back, on the pixels the processor shows, refused when wrong."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from fusedvlm.data.boxes import (
    Box,
    boxes_to_tags,
    find_boxes,
    remap_boxes,
    square_placement,
    write_bracket,
    write_tag,
)

sides = st.integers(1, 3000)
unit = st.fractions(0, 1, max_denominator=2000)


@st.composite
def boxes(draw) -> Box:
    left, right = sorted([draw(unit), draw(unit)])
    top, bottom = sorted([draw(unit), draw(unit)])
    return Box(left, top, right, bottom)


@given(sides, sides, boxes())
def test_there_and_back_is_exact(width, height, box):
    placement = square_placement(width, height)
    placed = placement.place(box)
    assert placement.take_back(placed) == box
    assert all(0 <= value <= 1 for value in placed.corners)


@given(sides, sides, boxes(), st.integers(2, 6))
def test_text_keeps_its_kind_and_loses_at_most_its_rounding(width, height, box, digits):
    placement = square_placement(width, height)
    for written, step in ((write_bracket(box, digits), Fraction(1, 10**digits)), (write_tag(box), Fraction(1, 999))):
        moved = remap_boxes(f"a {written} b", placement)
        assert moved.startswith(f"a {written[0]}")
        assert moved.count(".") == written.count(".")
        [read], [wanted] = find_boxes(moved), [placement.place(known) for known in find_boxes(written)]
        assert max(abs(a - b) for a, b in zip(read.corners, wanted.corners, strict=True)) <= step / 2


@given(boxes())
def test_three_digits_hold_a_tag_whole(box):
    tag = write_tag(box)
    [read] = find_boxes(tag)
    assert boxes_to_tags(write_bracket(read, 3)) == tag


def test_worked_example():
    """640 x 480: shrunk to 336 x 252 on a square of 336, 42 rows of padding above."""
    placement = square_placement(640, 480)
    assert (placement.left, placement.width) == (0, 1)
    assert (placement.top, placement.height) == (Fraction(42, 336), Fraction(252, 336))
    assert remap_boxes("[0.100, 0.000, 0.5, 1.0]", placement) == "[0.100, 0.125, 0.500, 0.875]"
    assert remap_boxes("[0.100, 0.125, 0.500, 0.875]", placement, inverse=True) == "[0.100, 0.000, 0.500, 1.000]"
    assert remap_boxes("<bbox>0,0,999,999</bbox>", placement) == "<bbox>0,125,999,874</bbox>"
    assert square_placement(50, 50).place(Box(*map(Fraction, "0011"))) == Box(*map(Fraction, "0011"))


@pytest.mark.parametrize("size", [(640, 480), (200, 500), (90, 30)])
def test_the_box_is_where_the_processor_shows_the_thing(size):
    """A red rectangle, its box, and the red pixels of the global view and of the canvas."""
    from fusedvlm.processing import FusedVLMImageProcessorPil

    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x1, y1, x2, y2 = width // 4, height // 5, width // 2, height * 4 // 5
    pixels[y1:y2, x1:x2, 0] = 255
    box = Box(Fraction(x1, width), Fraction(y1, height), Fraction(x2, width), Fraction(y2, height))
    processor = FusedVLMImageProcessorPil(size={"height": 336, "width": 336}, max_local_views=9)
    views = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    mean, std = np.array(processor.image_mean)[:, None, None], np.array(processor.image_std)[:, None, None]
    whole = views * std + mean
    found = np.argwhere((whole[0] > 0.5) & (whole[1] < 0.5))
    placed = [float(value) * 336 for value in square_placement(width, height).place(box).corners]
    top, left = found.min(axis=0)
    bottom, right = found.max(axis=0) + 1
    assert [left, top, right, bottom] == pytest.approx(placed, abs=2.5)


@pytest.mark.parametrize(
    "text",
    [
        "<bbox>1,2,3</bbox>",
        "<bbox>1,2,3,4",
        "1,2,3,4</bbox>",
        "<bbox>0,0,1000,5</bbox>",
        "<bbox>a,b,c,d</bbox>",
        "<bbox>5,0,4,9</bbox>",
        "<bbox>-1,0,4,9</bbox>",
        "[0.1, 0.2, 0.3, 1.2]",
        "[0.5, 0.2, 0.3, 0.9]",
        "[-0.5, 0.2, 0.3, 0.9]",
    ],
)
def test_wrong_boxes_are_refused(text):
    with pytest.raises(ValueError, match=r"[Bb]ox"):
        find_boxes(text)
    with pytest.raises(ValueError, match=r"[Bb]ox"):
        remap_boxes(text, square_placement(64, 48))


def test_lists_that_are_no_boxes_are_left_alone():
    text = "[1, 2, 3, 4], [0, 1, 0, 1], [0.5, 0.5] and [0.1, 0.2, 0.3, 0.4, 0.5]"
    assert remap_boxes(text, square_placement(64, 48)) == text
    assert len(find_boxes("[0, 0, 1, 1]")) == 1


def test_a_box_in_the_padding_is_not_in_the_image():
    with pytest.raises(ValueError, match="Box"):
        square_placement(640, 480).take_back(Box(*map(Fraction, ("0", "0", "1", "0.5"))))

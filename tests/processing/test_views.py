"""HD geometry against the published procedure, for every shape of image."""

import math

import pytest
from hypothesis import given, strategies as st

from fusedvlm.processing.image_processing_fusedvlm_views import count_views, plan_canvas, plan_global_square

# (width, height, most local views) -> views, as published
PUBLISHED = {
    (640, 480, 9): 10, (480, 640, 9): 10, (1000, 200, 9): 6, (200, 1000, 9): 6, (336, 336, 9): 10, (1, 1, 9): 10,
    (5000, 3000, 9): 7, (97, 1013, 9): 10, (640, 480, 16): 13, (480, 640, 16): 13, (1000, 200, 16): 17,
    (200, 1000, 16): 17, (336, 336, 16): 17, (1, 1, 16): 17, (5000, 3000, 16): 16, (97, 1013, 16): 11,
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_view_counts(case):
    width, height, most = case
    assert count_views(height, width, 336, most) == PUBLISHED[case]


def most_columns(long: int, short: int, most: int) -> int:
    """By trying every number of columns, in whole numbers: the most whose tiles, rows rounded up, are allowed."""
    return max(columns for columns in range(1, most + 1) if columns * -(-columns * short // long) <= most)


sides = st.one_of(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    # Sides that divide each other, where rounding errors of their ratio would show.
    st.tuples(st.integers(1, 60), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] * pair[1])),
)


@given(sides, st.booleans(), st.sampled_from([8, 24, 336]), st.integers(1, 20))
def test_canvas_is_the_largest_that_the_tiles_allow(pair, turned, tile, most):
    long, short = max(pair), min(pair)
    width, height = (short, long) if turned else (long, short)
    canvas = plan_canvas(height, width, tile, most)
    along, across = (canvas.rows, canvas.columns) if width < height else (canvas.columns, canvas.rows)
    resized = (canvas.resized_width, canvas.resized_height)
    assert along == most_columns(long, short, most)
    assert max(resized) == along * tile  # the long side fills the canvas
    exact = along * tile * short / long
    assert max(1, exact - 1) - 1e-6 <= min(resized) <= max(1, exact)  # the short side keeps the shape, rounded down
    assert across == math.ceil(min(resized) / tile)  # no row of tiles without picture
    assert canvas.resized_width + canvas.pad_left + canvas.pad_right == canvas.columns * tile
    assert canvas.resized_height + canvas.pad_top + canvas.pad_bottom == canvas.rows * tile
    assert 0 <= canvas.pad_bottom - canvas.pad_top <= 1
    assert 0 <= canvas.pad_right - canvas.pad_left <= 1
    assert canvas.rows * canvas.columns <= most


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([8, 336]))
def test_global_square_holds_the_whole_image_in_the_middle(width, height, tile):
    square = plan_global_square(height, width, tile)
    assert square.side == (max(width, height) if width == height else min(max(width, height), tile))
    assert max(square.height, square.width) == square.side
    assert square.top == (square.side - square.height) // 2
    assert square.left == (square.side - square.width) // 2
    assert square.height <= height
    assert square.width <= width


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (3000, 5)])
def test_very_thin_images_work_by_default_and_fail_as_published_when_asked(size):
    width, height = size
    assert count_views(height, width, 336, 9) >= 2

    def published() -> None:
        plan_canvas(height, width, 336, 9, keep_thin_images=False)
        plan_global_square(height, width, 336, keep_thin_images=False)

    with pytest.raises(ValueError, match="height and width must be > 0"):
        published()
    assert min(plan_global_square(height, width, 336).height, plan_global_square(height, width, 336).width) == 1


def test_no_local_views():
    assert plan_canvas(100, 200, 336, 0) is None
    assert count_views(100, 200, 336, 0) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((10, 0, 336, 9), "0 x 10 pixels"), ((10, 10, 336, -1), "max_local_views=-1"), ((10, 10, 0, 9), "Tiles of 0")],
)
def test_sizes_and_options_that_make_no_views_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_canvas(*arguments)
    with pytest.raises(ValueError, match=message):
        count_views(*arguments)

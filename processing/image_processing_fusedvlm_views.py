"""HD view geometry: how an image is cut into square views. Numbers only, no pixels.

Tile size S is the vision tower's image size. The image is scaled to fill a canvas of whole tiles, keeping its
proportions, and the canvas is cut into tiles; one more view shows the whole image (fusedvlm's docs/reference.md,
"HD views").

Worked example, 640 x 480 with at most 9 local views and S = 336:

    ratio = 640 / 480 = 1.333
    columns 1: 1 x ceil(1 / 1.333) = 1 tile     fits
    columns 2: 2 x ceil(2 / 1.333) = 4 tiles    fits
    columns 3: 3 x ceil(3 / 1.333) = 9 tiles    fits
    columns 4: 4 x ceil(4 / 1.333) = 12 tiles   too many: 3 columns
    resized to 1008 x int(1008 / 1.333) = 1008 x 756, padded to 1008 x 1008: 126 white rows above and below

    +-----+-----+-----+      local views are numbered row by row: 1 2 3 / 4 5 6 / 7 8 9
    |  1  |  2  |  3  |      view 0 is the global one
    +-----+-----+-----+
    |  4  |  5  |  6  |      a portrait image is mirrored along its main diagonal first, laid out like a landscape one,
    +-----+-----+-----+      and mirrored back: 480 x 640 gives 3 columns x 3 rows with white at the left and right
    |  7  |  8  |  9  |
    +-----+-----+-----+
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Canvas:
    """Canvas of local views of one image, in the image's own orientation.

    `resized_height` x `resized_width` is the image on it, `pad_*` the white pixels around, `rows` x `columns` tiles.
    """

    resized_height: int
    resized_width: int
    pad_top: int
    pad_bottom: int
    pad_left: int
    pad_right: int
    rows: int
    columns: int
    is_portrait: bool


def check_size(height: int, width: int, tile_size: int, max_local_views: int = 0) -> None:
    """Raise `ValueError` for an image without pixels and for options that make no views."""
    if height < 1 or width < 1:
        raise ValueError(f"An image of {width} x {height} pixels has nothing to look at.")
    if tile_size < 1:
        raise ValueError(f"Tiles of {tile_size} pixels show nothing; use the vision tower's image size.")
    if max_local_views < 0:
        raise ValueError(f"max_local_views={max_local_views} must not be negative; 0 keeps the global view only.")


def plan_canvas(
    height: int, width: int, tile_size: int, max_local_views: int, keep_thin_images: bool = True
) -> Canvas | None:
    """Lay out the local views of an image.

    Args:
        height, width: of the image, in pixels.
        tile_size: S.
        max_local_views: at most so many tiles; 0 means no local views.
        keep_thin_images: give extremely thin images a canvas at least one pixel high. The published code fails on them,
            which `False` reproduces.

    Returns:
        The canvas, or None for `max_local_views=0`.

    Raises:
        ValueError: for an image without pixels, one too thin with `keep_thin_images=False`, or a negative
            `max_local_views`.
    """
    check_size(height, width, tile_size, max_local_views)
    if max_local_views == 0:
        return None
    is_portrait = width < height
    long_side, short_side = (height, width) if is_portrait else (width, height)
    ratio = long_side / short_side
    tiles = 1
    while tiles * math.ceil(tiles / ratio) <= max_local_views:
        tiles += 1
    tiles -= 1
    resized_long = tile_size * tiles
    resized_short = int(resized_long / ratio)
    if resized_short == 0:
        if not keep_thin_images:
            raise ValueError(f"height and width must be > 0: {width} x {height} shrinks to nothing on the canvas.")
        resized_short = 1
    across = math.ceil(resized_short / tile_size)
    gap = across * tile_size - resized_short
    before, after = int(gap / 2), gap - int(gap / 2)
    if is_portrait:
        return Canvas(resized_long, resized_short, 0, 0, before, after, tiles, across, True)
    return Canvas(resized_short, resized_long, before, after, 0, 0, across, tiles, False)


def count_views(height: int, width: int, tile_size: int, max_local_views: int, keep_thin_images: bool = True) -> int:
    """Views of an image of that size, the global one included.

    >>> count_views(480, 640, 336, 9), count_views(200, 1000, 336, 9), count_views(1, 1, 336, 9)
    (10, 6, 10)
    """
    canvas = plan_canvas(height, width, tile_size, max_local_views, keep_thin_images)
    return 1 if canvas is None else 1 + canvas.rows * canvas.columns


@dataclass(frozen=True)
class GlobalSquare:
    """The whole image on a black square: shrunk to `height x width` where needed, pasted at (`top`, `left`)."""

    side: int
    height: int
    width: int
    top: int
    left: int
    is_shrunk: bool


def plan_global_square(height: int, width: int, tile_size: int, keep_thin_images: bool = True) -> GlobalSquare:
    """Place an image on the square that becomes the global view (fusedvlm's docs/reference.md, "The global view").

    A square image is used at its full size, whatever that is. A large one is therefore decimated with aliasing where
    one that is not square is shrunk smoothly. This is how the published checkpoints were trained, so it stays.

    Raises:
        ValueError: for an image without pixels, or one too thin with `keep_thin_images=False`.
    """
    check_size(height, width, tile_size)
    long_side = max(height, width)
    if height == width:
        return GlobalSquare(long_side, height, width, 0, 0, is_shrunk=False)
    is_shrunk = long_side > tile_size
    if is_shrunk:
        scale = tile_size / long_side
        height = tile_size if height == long_side else int(height * scale)
        width = tile_size if width == long_side else int(width * scale)
        if min(height, width) == 0 and not keep_thin_images:
            raise ValueError("height and width must be > 0: the image shrinks to nothing on the global view.")
        height, width = max(height, 1), max(width, 1)
    side = max(height, width)
    return GlobalSquare(side, height, width, (side - height) // 2, (side - width) // 2, is_shrunk)

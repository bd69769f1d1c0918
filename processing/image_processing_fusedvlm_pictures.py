"""8-bit pictures in CPU memory to views, straight from Pillow's memory: every view is written once, and in place.

The same pixels, bit by bit, as laying out a canvas, normalizing it and cutting it up, at less than half the cost:
pictures are resized as Pillow holds them, each tile is copied from the resized picture to its place among all views of
the batch and normalized there while it is in the processor's cache. The resizes of a batch share torch's threads.

Shape legend
    V   views of all pictures     S   side of a view
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import PILImageResampling

from .image_processing_fusedvlm_views import Canvas, GlobalSquare, plan_canvas, plan_global_square

WHITE = 255
# Without exactness, pictures of more than so many times the wanted size are first halved or more by averages.
REDUCING_GAP = 2.5


@dataclass(frozen=True)
class ViewOptions:
    """How pictures become views.

    Args:
        tile_size: S.
        max_local_views, global_view, keep_thin_images, resample: as in `FusedVLMImageProcessorKwargs`.
        exact: resize with Pillow, as the published code; else tiles are resized by torch, to one gray level, and large
            pictures are averaged before they are shrunk to the global view.
        uint8_views: levels of 0..255 as they are, one byte each.
    """

    tile_size: int
    max_local_views: int
    global_view: str
    keep_thin_images: bool
    resample: PILImageResampling
    exact: bool = True
    uint8_views: bool = False


# Normalizes (3, h, w) float32 levels in place.
Finish = Callable[[torch.Tensor], Any]


def as_picture(image: np.ndarray | torch.Tensor) -> Image.Image | None:
    """(3, H, W) of 8 bits in CPU memory as a picture; None for what is no such thing."""
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8 or image.device.type != "cpu":
            return None
        image = image.numpy()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        return None
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


@torch.inference_mode(False)  # which is a thread's own: others could not write into tensors made in it
def views_of_pictures(
    pictures: list[Image.Image], options: ViewOptions, finish: Finish
) -> tuple[torch.Tensor, list[int]]:
    """Views of all pictures, and how many each has.

    Args:
        pictures: RGB.
        options: how they are cut.
        finish: normalizes levels in place; not called with `uint8_views`.

    Returns:
        (V, 3, S, S) float32, or uint8 with `uint8_views`; (I,) as a list.
    """
    plans = [_Plans.of(picture, options) for picture in pictures]
    counts = [plan.num_views for plan in plans]
    dtype = torch.uint8 if options.uint8_views else torch.float32
    views = torch.empty(sum(counts), 3, options.tile_size, options.tile_size, dtype=dtype)
    do_finish: Finish = (lambda levels: None) if options.uint8_views else finish
    jobs: list[Callable[[], None]] = []
    for picture, plan, own in zip(pictures, plans, views.split(counts), strict=True):
        jobs += _jobs(picture, plan, own, options, do_finish)
    _run(jobs)
    return views, counts


@dataclass(frozen=True)
class _Plans:
    canvas: Canvas | None
    square: GlobalSquare

    @classmethod
    def of(cls, picture: Image.Image, options: ViewOptions) -> "_Plans":
        size = (picture.height, picture.width, options.tile_size)
        canvas = plan_canvas(*size, options.max_local_views, options.keep_thin_images)
        return cls(canvas, plan_global_square(*size, options.keep_thin_images))

    @property
    def num_views(self) -> int:
        return 1 + (0 if self.canvas is None else self.canvas.rows * self.canvas.columns)


def _jobs(
    picture: Image.Image, plans: _Plans, views: torch.Tensor, options: ViewOptions, finish: Finish
) -> list[Callable[[], None]]:
    """What is to be done for one picture, in parts that can run at once."""
    canvas = plans.canvas
    if canvas is None:
        return [lambda: _fill_global(picture, plans.square, views[0], options, finish)]
    if options.global_view == "canvas":

        def both() -> None:
            _fill_tiles(picture, canvas, views[1:], options, finish)
            _shrink_canvas(canvas, views, options)

        return [both]
    return [
        lambda: _fill_tiles(picture, canvas, views[1:], options, finish),
        lambda: _fill_global(picture, plans.square, views[0], options, finish),
    ]


def _run(jobs: list[Callable[[], None]]) -> None:
    """All of them, on as many threads as torch may use: one in a worker of a data loader."""
    threads = min(len(jobs), torch.get_num_threads())
    if threads <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def _fill_tiles(
    picture: Image.Image, canvas: Canvas, tiles: torch.Tensor, options: ViewOptions, finish: Finish
) -> None:
    """Write the local views (rows x columns, 3, S, S): the resized picture, with white around it."""
    resized = (_resized if options.exact else _resized_by_torch)(picture, canvas, options)
    size = options.tile_size
    for number, tile in enumerate(tiles):
        top = number // canvas.columns * size - canvas.pad_top
        left = number % canvas.columns * size - canvas.pad_left
        rows = slice(max(top, 0), min(top + size, canvas.resized_height))
        columns = slice(max(left, 0), min(left + size, canvas.resized_width))
        part = resized[:, rows, columns]
        if part.shape[1:] != tile.shape[1:]:
            tile.fill_(WHITE)
        tile[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left].copy_(part)
        finish(tile)


def _resized(picture: Image.Image, canvas: Canvas, options: ViewOptions) -> torch.Tensor:
    """(3, h, w) by Pillow, as the published checkpoints were trained with."""
    target = (canvas.resized_width, canvas.resized_height)
    if not canvas.is_portrait:
        return _to_tensor(picture.resize(target, options.resample))
    # Mirrored along the diagonal like the published code: resizing rounds differently the other way round.
    mirrored = picture.transpose(Image.Transpose.TRANSPOSE).resize(target[::-1], options.resample)
    return _to_tensor(mirrored).transpose(1, 2)


def _resized_by_torch(picture: Image.Image, canvas: Canvas, options: ViewOptions) -> torch.Tensor:
    """(3, h, w) by torch's 8-bit kernels: up to one gray level from Pillow's, bilinear and bicubic alone.

    Pictures that grow are resized by Pillow: there one pixel in a million would be two levels off.
    """
    modes = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}
    mode = modes.get(PILImageResampling(options.resample))
    if mode is None or picture.width < canvas.resized_width:
        return _resized(picture, canvas, options)
    size = (canvas.resized_height, canvas.resized_width)
    return torch.nn.functional.interpolate(_to_tensor(picture)[None], size=size, mode=mode, antialias=True)[0]


def _fill_global(
    picture: Image.Image, square: GlobalSquare, view: torch.Tensor, options: ViewOptions, finish: Finish
) -> None:
    """Write the global view (3, S, S): the picture on a black square, resized once normalized, as published."""
    if square.is_shrunk:
        gap = None if options.exact else REDUCING_GAP
        size = (square.width, square.height)
        picture = picture.resize(size, PILImageResampling.LANCZOS, reducing_gap=gap)
    levels = _to_tensor(picture)
    is_whole = square.side == options.tile_size
    target = view if is_whole else torch.empty(3, square.side, square.side, dtype=torch.float32)
    if levels.shape != target.shape:
        target.zero_()
    target[:, square.top : square.top + square.height, square.left : square.left + square.width].copy_(levels)
    finish(target)
    if not is_whole:
        _resize_into(view, target)


def _shrink_canvas(canvas: Canvas, views: torch.Tensor, options: ViewOptions) -> None:
    """Write the global view as the canvas of the local ones."""
    size = options.tile_size
    tiles = views[1:].float().view(canvas.rows, canvas.columns, 3, size, size)
    _resize_into(views[0], tiles.permute(2, 0, 3, 1, 4).reshape(3, canvas.rows * size, canvas.columns * size))


def _resize_into(view: torch.Tensor, image: torch.Tensor) -> None:
    resized = resize_bicubic(image, view.shape[-1])
    # Bytes cannot hold what lies between levels, or overshoots: the nearest level it is.
    view.copy_(resized if view.is_floating_point() else resized.round().clamp(0, WHITE))


def resize_bicubic(image: torch.Tensor, tile_size: int) -> torch.Tensor:
    """Normalized (3, H, W) to (3, S, S) by plain bicubic interpolation, as published: without antialiasing."""
    if tuple(image.shape[-2:]) == (tile_size, tile_size):
        return image
    return torch.nn.functional.interpolate(
        image[None], size=(tile_size, tile_size), mode="bicubic", align_corners=False, antialias=False
    )[0]


def _to_tensor(picture: Image.Image) -> Any:
    """(3, H, W) view of a picture's pixels, which stay interleaved in memory."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

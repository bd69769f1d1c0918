"""HD views with Pillow; needs no torchvision. Same options and, on 8-bit pixels, the same result as its twin."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import Unpack

from .image_processing_fusedvlm_arrays import check_levels
from .image_processing_fusedvlm_common import (
    WHITE,
    FusedVLMImageProcessorKwargs,
    FusedVLMImageProcessorMixin,
    cut_tiles,
    resize_bicubic,
    resize_with_pillow,
)
from .image_processing_fusedvlm_views import plan_canvas, plan_global_square

if TYPE_CHECKING:  # so that saving copies the other backend's file too
    from .image_processing_fusedvlm import FusedVLMImageProcessor  # noqa: F401


class FusedVLMImageProcessorPil(FusedVLMImageProcessorMixin, PilBackend):
    """Images to views; see `FusedVLMImageProcessor`."""

    def __init__(self, **kwargs: Unpack[FusedVLMImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]  # there it is annotated with the usual options

    def process_image(
        self, image: Any, do_convert_rgb: bool | None = None, input_data_format: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """One image as a (3, H, W) array: pictures upright and RGB, arrays and tensors of uint8 or float32."""
        image, do_convert_rgb, layout = self.to_levels(image, do_convert_rgb, input_data_format)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, input_data_format=layout, **kwargs)

    def _preprocess(  # type: ignore[override]  # options go by name, those of padding in kwargs
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        max_local_views: int,
        global_view: str,
        keep_thin_images: bool,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        tile_size = self.check_options(size, max_local_views, global_view)
        if not images:
            raise ValueError("There are no images to process.")
        if global_view == "canvas" and max_local_views == 0:
            raise ValueError("global_view='canvas' shows the canvas of local views: max_local_views=0 has none.")

        def finish(image: np.ndarray) -> torch.Tensor:
            image = self.rescale(image, rescale_factor) if do_rescale else image
            image = self.normalize(image, image_mean, image_std) if do_normalize else image
            return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))

        views = []
        for image in images:
            check_levels(image, do_rescale, rescale_factor, do_normalize)
            if not do_resize:
                views.append(finish(image)[None])
                continue
            white = WHITE if do_rescale or image.dtype == np.uint8 else 1
            laid_out = self._canvas(image, tile_size, max_local_views, keep_thin_images, resample, white)
            canvas = None if laid_out is None else finish(laid_out)
            if global_view == "canvas" and canvas is not None:
                whole = canvas
            else:
                whole = finish(self._global_square(image, tile_size, keep_thin_images, white))
            parts = [resize_bicubic(whole, tile_size)[None]]
            if canvas is not None:
                parts.append(cut_tiles(canvas, tile_size))
            views.append(torch.cat(parts))
        data = {
            "pixel_values": [view.numpy() for image in views for view in image],
            "image_num_views": [len(image) for image in views],
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _canvas(
        self,
        image: np.ndarray,
        tile_size: int,
        max_local_views: int,
        keep_thin_images: bool,
        resample: PILImageResampling,
        white: int,
    ) -> np.ndarray | None:
        height, width = image.shape[-2:]
        plan = plan_canvas(height, width, tile_size, max_local_views, keep_thin_images)
        if plan is None:
            return None
        height, width = plan.resized_height, plan.resized_width
        # Mirrored along the diagonal like the published code: resizing rounds differently the other way round.
        source = image.transpose(0, 2, 1) if plan.is_portrait else image
        target = (width, height) if plan.is_portrait else (height, width)
        resized = resize_with_pillow(source, target, resample)
        resized = resized.transpose(0, 2, 1) if plan.is_portrait else resized
        margins = ((0, 0), (plan.pad_top, plan.pad_bottom), (plan.pad_left, plan.pad_right))
        return np.pad(resized, margins, constant_values=white)

    def _global_square(self, image: np.ndarray, tile_size: int, keep_thin_images: bool, white: int) -> np.ndarray:
        height, width = image.shape[-2:]
        plan = plan_global_square(height, width, tile_size, keep_thin_images)
        if plan.is_shrunk:
            # In 8 bits even for floats: Lanczos overshoots at edges, and the published code cuts that off in between.
            is_bytes = image.dtype == np.uint8
            levels = image if is_bytes else np.rint(image * (WHITE / white)).clip(0, WHITE).astype(np.uint8)
            levels = resize_with_pillow(levels, (plan.height, plan.width), PILImageResampling.LANCZOS)
            image = levels if is_bytes else levels.astype(np.float32) * np.float32(white / WHITE)
        right, bottom = plan.side - plan.width - plan.left, plan.side - plan.height - plan.top
        return np.pad(image, ((0, 0), (plan.top, bottom), (plan.left, right)))


FusedVLMImageProcessorPil.register_for_auto_class("AutoImageProcessor")

__all__ = ["FusedVLMImageProcessorPil"]

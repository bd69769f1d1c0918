"""HD views with Pillow; needs no torchvision. Same options and, on 8-bit pixels, the same result as its twin."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import Unpack

from .image_processing_fusedvlm_common import (
    FusedVLMImageProcessorKwargs,
    FusedVLMImageProcessorMixin,
    LevelScale,
    resize_with_pillow,
)
from .image_processing_fusedvlm_pictures import WHITE, Finish, ViewOptions
from .image_processing_fusedvlm_views import plan_canvas, plan_global_square

if TYPE_CHECKING:  # so that saving copies the other backend's file too
    from .image_processing_fusedvlm import FusedVLMImageProcessor  # noqa: F401


class FusedVLMImageProcessorPil(FusedVLMImageProcessorMixin, PilBackend):  # type: ignore[misc]
    """Images to views; see `FusedVLMImageProcessor`."""

    def __init__(self, **kwargs: Unpack[FusedVLMImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]  # there it is annotated with the usual options

    def _finish(self, image: np.ndarray, scale: LevelScale) -> torch.Tensor:
        image = self.rescale(image, scale.rescale_factor) if scale.do_rescale else image
        image = self.normalize(image, scale.image_mean, scale.image_std) if scale.do_normalize else image
        return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))

    def _finish_in_place(self, scale: LevelScale) -> Finish:
        # transformers rescales in float64 and rounds. A division of float32 gives the same where the factor is the
        # inverse of a whole number, which all 256 levels are asked about; else it is float64 here, too.
        levels = np.arange(WHITE + 1, dtype=np.uint8)
        divisor = float(round(1 / scale.rescale_factor)) if scale.do_rescale and scale.rescale_factor else 0.0
        is_division = divisor != 0 and np.array_equal(
            levels.astype(np.float32) / np.float32(divisor),
            self.rescale(levels[None, None], scale.rescale_factor)[0, 0],
        )
        mean, std = (
            torch.as_tensor(np.broadcast_to(np.asarray(values, dtype=np.float32), 3).copy()).view(3, 1, 1)
            for values in (scale.image_mean, scale.image_std)
        )

        def finish(view: torch.Tensor) -> None:
            if is_division:
                view.div_(divisor)
            elif scale.do_rescale:
                view.copy_(view.double().mul_(scale.rescale_factor))
            if scale.do_normalize:
                view.sub_(mean).div_(std)

        return finish

    @staticmethod
    def _as_result(view: torch.Tensor) -> np.ndarray:
        return view.numpy()

    def _canvas(self, image: np.ndarray, options: ViewOptions, white: int) -> np.ndarray | None:
        height, width = image.shape[-2:]
        plan = plan_canvas(height, width, options.tile_size, options.max_local_views, options.keep_thin_images)
        if plan is None:
            return None
        height, width = plan.resized_height, plan.resized_width
        # Mirrored along the diagonal like the published code: resizing rounds differently the other way round.
        source = image.transpose(0, 2, 1) if plan.is_portrait else image
        target = (width, height) if plan.is_portrait else (height, width)
        resized = resize_with_pillow(source, target, options.resample)
        resized = resized.transpose(0, 2, 1) if plan.is_portrait else resized
        margins = ((0, 0), (plan.pad_top, plan.pad_bottom), (plan.pad_left, plan.pad_right))
        return np.pad(resized, margins, constant_values=white)

    def _global_square(self, image: np.ndarray, options: ViewOptions, white: int) -> np.ndarray:
        height, width = image.shape[-2:]
        plan = plan_global_square(height, width, options.tile_size, options.keep_thin_images)
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

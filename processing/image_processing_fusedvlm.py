"""HD views with torchvision: one global view and up to `max_local_views` tiles per image.

As in fusedvlm's docs/reference.md, "HD views".
"""

from typing import TYPE_CHECKING

import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
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
    from .image_processing_pil_fusedvlm import FusedVLMImageProcessorPil  # noqa: F401


class FusedVLMImageProcessor(FusedVLMImageProcessorMixin, TorchvisionBackend):  # type: ignore[misc]
    """Images to views.

    Returns `pixel_values` (V, 3, S, S), normalized, image after image with the global view first, and `image_num_views`
    (I,). On 8-bit pixels in CPU memory the result is that of the published code, whichever backend is there; with
    `exact=False` or on an accelerator, where torch resizes, tiles differ by at most one gray level. Floats are 0..1
    with `do_rescale=False`, else 0..255.
    """

    def __init__(self, **kwargs: Unpack[FusedVLMImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]  # there it is annotated with the usual options

    def _finish(self, image: torch.Tensor, scale: LevelScale) -> torch.Tensor:
        return self.rescale_and_normalize(
            image, scale.do_rescale, scale.rescale_factor, scale.do_normalize, scale.image_mean, scale.image_std
        )

    def _finish_in_place(self, scale: LevelScale) -> Finish:
        if not scale.do_normalize:
            return (lambda levels: levels.mul_(scale.rescale_factor)) if scale.do_rescale else (lambda levels: levels)
        mean, std, _ = self._fuse_mean_std_and_rescale_factor(
            do_normalize=True,
            image_mean=scale.image_mean,
            image_std=scale.image_std,
            do_rescale=scale.do_rescale,
            rescale_factor=scale.rescale_factor,
            device=torch.device("cpu"),
        )
        mean, std = (torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        return lambda levels: levels.sub_(mean).div_(std)

    @staticmethod
    def _as_result(view: torch.Tensor) -> torch.Tensor:
        return view

    def _canvas(self, image: torch.Tensor, options: ViewOptions, white: int) -> torch.Tensor | None:
        height, width = image.shape[-2:]
        plan = plan_canvas(height, width, options.tile_size, options.max_local_views, options.keep_thin_images)
        if plan is None:
            return None
        height, width = plan.resized_height, plan.resized_width
        # Mirrored along the diagonal like the published code: resizing rounds differently the other way round.
        source = image.transpose(-1, -2).contiguous() if plan.is_portrait else image
        target = (width, height) if plan.is_portrait else (height, width)
        resized = self._resize(source, target, options.resample)
        resized = resized.transpose(-1, -2) if plan.is_portrait else resized
        return tvF.pad(resized, [plan.pad_left, plan.pad_top, plan.pad_right, plan.pad_bottom], fill=white)

    def _global_square(self, image: torch.Tensor, options: ViewOptions, white: int) -> torch.Tensor:
        height, width = image.shape[-2:]
        plan = plan_global_square(height, width, options.tile_size, options.keep_thin_images)
        if plan.is_shrunk:
            # In 8 bits even for floats: Lanczos overshoots at edges, and the published code cuts that off in between.
            levels = image if image.dtype == torch.uint8 else (image * (WHITE / white)).round().clamp(0, WHITE).byte()
            levels = self._resize(levels, (plan.height, plan.width), PILImageResampling.LANCZOS)
            image = levels if image.dtype == torch.uint8 else levels.to(image.dtype) * (white / WHITE)
        right, bottom = plan.side - plan.width - plan.left, plan.side - plan.height - plan.top
        return tvF.pad(image, [plan.left, plan.top, right, bottom], fill=0)

    @staticmethod
    def _resize(image: torch.Tensor, size: tuple[int, int], resample: PILImageResampling) -> torch.Tensor:
        """Pillow for 8-bit pixels on the CPU and for Lanczos, torchvision for everything else.

        torchvision rounds differently from the Pillow code the checkpoints were trained with: up to one gray level for
        bilinear, up to nine for Lanczos, which it lacks on accelerators altogether.
        """
        resample = PILImageResampling(resample)
        on_cpu = image.device.type == "cpu"
        if resample == PILImageResampling.LANCZOS or (image.dtype == torch.uint8 and on_cpu):
            resized = resize_with_pillow(image.cpu().numpy(), size, resample)
            return torch.from_numpy(resized.copy()).to(image.device)
        return tvF.resize(image, size, interpolation=getattr(tvF.InterpolationMode, resample.name), antialias=True)


FusedVLMImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["FusedVLMImageProcessor"]

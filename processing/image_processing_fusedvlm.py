"""HD views with torchvision: one global view and up to `max_local_views` tiles per image.

As in fusedvlm's docs/reference.md, "HD views".
"""

from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
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
    from .image_processing_pil_fusedvlm import FusedVLMImageProcessorPil  # noqa: F401


class FusedVLMImageProcessor(FusedVLMImageProcessorMixin, TorchvisionBackend):
    """Images to views.

    Returns `pixel_values` (V, 3, S, S), normalized, image after image with the global view first, and `image_num_views`
    (I,). On 8-bit pixels in CPU memory the result is that of the published code, whichever backend is installed; on an
    accelerator, where torchvision resizes, tiles differ by at most one gray level. Floats are 0..1 with
    `do_rescale=False`, else 0..255.
    """

    def __init__(self, **kwargs: Unpack[FusedVLMImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]  # there it is annotated with the usual options

    def process_image(  # type: ignore[override]  # the device goes through kwargs
        self, image: Any, do_convert_rgb: bool | None = None, input_data_format: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """One image as a (3, H, W) tensor: pictures upright and RGB, arrays and tensors of uint8 or float32."""
        image, do_convert_rgb, layout = self.to_levels(image, do_convert_rgb, input_data_format)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, input_data_format=layout, **kwargs)

    def _preprocess(  # type: ignore[override]  # options go by name, those of padding in kwargs
        self,
        images: list[torch.Tensor],
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

        def finish(image: torch.Tensor) -> torch.Tensor:
            return self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

        views = []
        for image in images:
            check_levels(image, do_rescale, rescale_factor, do_normalize)
            if not do_resize:
                views.append(finish(image)[None])
                continue
            white = WHITE if do_rescale or not image.is_floating_point() else 1
            laid_out = self._canvas(image, tile_size, max_local_views, keep_thin_images, resample, white)
            canvas = None if laid_out is None else finish(laid_out)
            if global_view == "canvas" and canvas is not None:
                whole = canvas
            else:
                whole = finish(self._global_square(image, tile_size, keep_thin_images, white))
            parts = [resize_bicubic(whole.float(), tile_size)[None]]
            if canvas is not None:
                parts.append(cut_tiles(canvas.float(), tile_size))
            views.append(torch.cat(parts))
        data = {"pixel_values": [view for image in views for view in image], "image_num_views": [len(v) for v in views]}
        return BatchFeature(data, tensor_type=return_tensors)

    def _canvas(
        self,
        image: torch.Tensor,
        tile_size: int,
        max_local_views: int,
        keep_thin_images: bool,
        resample: PILImageResampling,
        white: int,
    ) -> torch.Tensor | None:
        height, width = image.shape[-2:]
        plan = plan_canvas(height, width, tile_size, max_local_views, keep_thin_images)
        if plan is None:
            return None
        height, width = plan.resized_height, plan.resized_width
        # Mirrored along the diagonal like the published code: resizing rounds differently the other way round.
        source = image.transpose(-1, -2).contiguous() if plan.is_portrait else image
        target = (width, height) if plan.is_portrait else (height, width)
        resized = self._resize(source, target, resample)
        resized = resized.transpose(-1, -2) if plan.is_portrait else resized
        return tvF.pad(resized, [plan.pad_left, plan.pad_top, plan.pad_right, plan.pad_bottom], fill=white)

    def _global_square(self, image: torch.Tensor, tile_size: int, keep_thin_images: bool, white: int) -> torch.Tensor:
        height, width = image.shape[-2:]
        plan = plan_global_square(height, width, tile_size, keep_thin_images)
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

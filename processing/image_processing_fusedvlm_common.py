"""What the torchvision and the PIL backend of the image processor share."""

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from .image_processing_fusedvlm_arrays import to_rgb_channels, to_usable_array
from .image_processing_fusedvlm_loading import fetch_images, to_upright_rgb
from .image_processing_fusedvlm_views import count_views

AUTO_CLASSES = {
    "torchvision": "image_processing_fusedvlm.FusedVLMImageProcessor",
    "pil": "image_processing_pil_fusedvlm.FusedVLMImageProcessorPil",
}
WHITE = 255


class FusedVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond the usual ones.

    Args:
        max_local_views: most local views per image (HD-9 is 9); 0 keeps the global view only.
        global_view: "padded_image" shows the image on a black square, as the published pipeline does; "canvas" shows
            the canvas of the local views, as the published image processor does on its own.
        keep_thin_images: see `plan_canvas`; `False` fails on extremely thin images as the published code does.
    """

    max_local_views: int
    global_view: Literal["padded_image", "canvas"]
    keep_thin_images: bool


class FusedVLMImageProcessorDefaults:
    """The published defaults, of both backends."""

    model_input_names = ["pixel_values", "image_num_views"]
    valid_kwargs: Any = FusedVLMImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size: Any = {"height": 336, "width": 336}
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    max_local_views: int = 9
    global_view = "padded_image"
    keep_thin_images = True


class FusedVLMImageProcessorMixin(FusedVLMImageProcessorDefaults):
    """View counting, checks, and an `auto_map` that names both backends."""

    _auto_class: Any  # of the backend it is mixed with

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load paths, URLs, base64 strings and bytes; everything else passes through."""
        return fetch_images(image_url_or_urls)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As the base class; refuses what only TRL's GRPO asks for, which would lose views and questions."""
        if "crop_to_patches" in kwargs:
            raise ValueError(
                "crop_to_patches is for models that have one row of pixels per tile and no questions. TRL's "
                "GRPOTrainer asks for it: use fusedvlm.trainers.FusedVLMGRPOTrainer, which carries HD views."
            )
        backend: Any = super()
        return backend.preprocess(images, *args, **kwargs)

    def check_options(self, size: SizeDict, max_local_views: int, global_view: str) -> int:
        """Tile size S. Raises `ValueError` for sizes or counts that make no views."""
        if size.height is None or size.height != size.width or size.height < 1:
            raise ValueError(f"size must be a square view, got height={size.height}, width={size.width}.")
        if max_local_views < 0:
            raise ValueError(f"max_local_views={max_local_views} must not be negative; 0 keeps the global view only.")
        if global_view not in ("padded_image", "canvas"):
            raise ValueError(f"global_view={global_view!r} must be 'padded_image' or 'canvas'.")
        return size.height

    @staticmethod
    def to_levels(image: Any, do_convert_rgb: bool | None, input_data_format: Any) -> tuple[Any, bool | None, Any]:
        """Pictures upright and RGB; arrays and tensors as uint8 or float32, and as (3, H, W) with `do_convert_rgb`.

        Returns:
            The image, and the `do_convert_rgb` and `input_data_format` that are left for the base class.
        """
        if isinstance(image, Image.Image):
            return to_upright_rgb(image), do_convert_rgb, input_data_format
        image = to_usable_array(image)
        if not do_convert_rgb:
            return image, do_convert_rgb, input_data_format
        return to_rgb_channels(image, input_data_format), False, ChannelDimension.FIRST

    def get_number_of_views(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Views of an image of that size, without looking at pixels."""
        options = images_kwargs or {}
        wanted: Any = options.get("size") or self.size
        size = wanted["height"] if isinstance(wanted, dict) else wanted.height
        max_local_views = options.get("max_local_views", self.max_local_views)
        return count_views(height, width, size, max_local_views)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Name under which transformers asks for `get_number_of_views`."""
        return self.get_number_of_views(height, width, images_kwargs)

    def to_dict(self) -> dict:
        """As the base class, with both backends in `auto_map`; saving records only the one in use."""
        backend: Any = super()
        output = backend.to_dict()
        if self._auto_class is not None or "auto_map" in output:
            output["auto_map"] = {"AutoImageProcessor": dict(AUTO_CLASSES)}
        return output


def cut_tiles(canvas: torch.Tensor, tile_size: int) -> torch.Tensor:
    """(3, rows x S, columns x S) to (rows x columns, 3, S, S), row by row."""
    channels, height, width = canvas.shape
    tiles = canvas.reshape(channels, height // tile_size, tile_size, width // tile_size, tile_size)
    return tiles.permute(1, 3, 0, 2, 4).reshape(-1, channels, tile_size, tile_size)


def resize_bicubic(image: torch.Tensor, tile_size: int) -> torch.Tensor:
    """Normalized (3, H, W) to (3, S, S) by plain bicubic interpolation, as published: without antialiasing."""
    if tuple(image.shape[-2:]) == (tile_size, tile_size):
        return image
    return torch.nn.functional.interpolate(
        image[None], size=(tile_size, tile_size), mode="bicubic", align_corners=False, antialias=False
    )[0]


def resize_with_pillow(image: np.ndarray, size: tuple[int, int], resample: Any) -> np.ndarray:
    """(3, H, W) to (3, *size) with Pillow; uint8 as one picture, floats channel by channel."""
    target = (size[1], size[0])
    if image.dtype == np.uint8 and image.shape[0] == 3:
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        return np.asarray(picture.resize(target, resample)).transpose(2, 0, 1)
    if image.dtype == np.uint8:
        channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in image]
    else:
        channels = [Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32), mode="F") for channel in image]
    return np.stack([np.asarray(channel.resize(target, resample)) for channel in channels])

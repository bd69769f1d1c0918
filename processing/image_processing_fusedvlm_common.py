"""What the torchvision and the PIL backend of the image processor share."""

from dataclasses import dataclass, fields
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

from .image_processing_fusedvlm_arrays import check_levels, to_rgb_channels, to_usable_array
from .image_processing_fusedvlm_loading import fetch_images, to_upright_rgb
from .image_processing_fusedvlm_pictures import (
    WHITE,
    ViewOptions,
    as_picture,
    resize_bicubic,
    views_of_pictures,
)
from .image_processing_fusedvlm_views import count_views

AUTO_CLASSES = {
    "torchvision": "image_processing_fusedvlm.FusedVLMImageProcessor",
    "pil": "image_processing_pil_fusedvlm.FusedVLMImageProcessorPil",
}
NO_LEVELS = np.empty(0, dtype=np.uint8)  # a picture has 8 bits, whatever its levels


class FusedVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond the usual ones.

    Args:
        max_local_views: most local views per image (HD-9 is 9); 0 keeps the global view only.
        global_view: "padded_image" shows the image on a black square, as the published pipeline does; "canvas" shows
            the canvas of the local views, as the published image processor does on its own.
        keep_thin_images: see `plan_canvas`; `False` fails on extremely thin images as the published code does.
        exact: whether views of 8-bit pictures are the published ones bit by bit; `False` is faster: tiles are shrunk
            by torch's kernels, up to one gray level off, and pictures of over 2.5 times the tile size are averaged
            before Lanczos shrinks them to the global view (fusedvlm's docs/performance.md has the differences).
        uint8_views: whether views are handed over as levels of 0..255, one byte each, and normalized by the model on
            its device (`read_uint8_views` of the model): a quarter of the bytes on the way. A global view that is
            interpolated after normalization (square pictures, and ones smaller than a tile) is rounded to levels.
    """

    max_local_views: int
    global_view: Literal["padded_image", "canvas"]
    keep_thin_images: bool
    exact: bool
    uint8_views: bool


@dataclass(frozen=True)
class LevelScale:
    """Options that say what becomes of levels, by their names in a call."""

    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any


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
    exact = True
    uint8_views = False


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

    def process_image(
        self, image: Any, do_convert_rgb: bool | None = None, input_data_format: Any = None, **kwargs: Any
    ) -> Any:
        """One image: 8 bits in CPU memory as a picture of Pillow, others as (3, H, W) of uint8 or float32."""
        image, do_convert_rgb, layout = self.to_levels(image, do_convert_rgb, input_data_format)
        is_resized = kwargs.get("do_resize") is not False and str(kwargs.get("device") or "cpu") == "cpu"
        if is_resized and isinstance(image, Image.Image):
            return image
        backend: Any = super()
        image = backend.process_image(image, do_convert_rgb=do_convert_rgb, input_data_format=layout, **kwargs)
        picture = as_picture(image) if is_resized else None
        return image if picture is None else picture

    def _preprocess(
        self,
        images: list[Any],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        max_local_views: int,
        global_view: str,
        keep_thin_images: bool,
        exact: bool = True,
        uint8_views: bool = False,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        tile_size = self.check_options(size, max_local_views, global_view)
        if not images:
            raise ValueError("There are no images to process.")
        if global_view == "canvas" and max_local_views == 0:
            raise ValueError("global_view='canvas' shows the canvas of local views: max_local_views=0 has none.")
        options = ViewOptions(tile_size, max_local_views, global_view, keep_thin_images, resample, exact, uint8_views)
        scale = LevelScale(**{field.name: kwargs[field.name] for field in fields(LevelScale)})
        for image in images:
            held = NO_LEVELS if isinstance(image, Image.Image) else image
            check_levels(held, scale.do_rescale or uint8_views, scale.rescale_factor, scale.do_normalize)
        if all(isinstance(image, Image.Image) for image in images):
            every, counts = views_of_pictures(images, options, self._finish_in_place(scale))
            if return_tensors is not None:  # in one piece: nothing is stacked again
                return BatchFeature({"pixel_values": every, "image_num_views": counts}, tensor_type=return_tensors)
            views = list(every.split(counts))
        else:
            views = [self._views_of_one(image, options, scale, do_resize) for image in images]
        data = {
            "pixel_values": [self._as_result(view) for own in views for view in own],
            "image_num_views": [len(own) for own in views],
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _views_of_one(self, image: Any, options: ViewOptions, scale: LevelScale, do_resize: bool) -> torch.Tensor:
        """(views, 3, S, S) of one picture, array or tensor."""
        if isinstance(image, Image.Image):
            return views_of_pictures([image], options, self._finish_in_place(scale))[0]
        if options.uint8_views:
            raise ValueError(
                "uint8_views needs pictures of 8 bits that are resized in CPU memory: no floats, no accelerator, no "
                "do_resize=False. Leave it out."
            )
        if not do_resize:
            return self._finish(image, scale)[None]
        is_float = str(image.dtype).rpartition(".")[2].startswith("float")
        white = WHITE if scale.do_rescale or not is_float else 1
        laid_out = self._canvas(image, options, white)
        canvas = None if laid_out is None else self._finish(laid_out, scale).float()
        if options.global_view == "canvas" and canvas is not None:
            whole = canvas
        else:
            whole = self._finish(self._global_square(image, options, white), scale).float()
        parts = [resize_bicubic(whole, options.tile_size)[None]]
        if canvas is not None:
            parts.append(cut_tiles(canvas, options.tile_size))
        return torch.cat(parts)

    # What the backends differ in: which arrays they compute with, and how these are normalized.
    _finish: Any
    _finish_in_place: Any
    _canvas: Any
    _global_square: Any
    _as_result: Any

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

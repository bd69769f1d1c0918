"""Arrays and tensors as pictures: which kinds, shapes and levels can be read, and one line about every other."""

import warnings
from typing import Any

import numpy as np
import torch

RGB_CHANNELS = (1, 3)
ALPHA_CHANNELS = (2, 4)
HALF_LEVEL = 0.5
# Levels of 0..1 may be off by half a level of 255.
SLACK = HALF_LEVEL / 255


def to_usable_array(image: Any) -> Any:
    """Whole numbers and truth values as uint8, floats as float32, so that both backends resize them alike.

    Args:
        image: an array or tensor; its memory may run backwards, be read-only, of another byte order, or on a graph of
            gradients.

    Returns:
        An array for an array, a tensor for a tensor.

    Raises:
        ValueError: for an array without pixels, of things that are no levels, whole numbers outside 0..255, or floats
            that are not finite.
    """
    if 0 in image.shape:
        raise ValueError(f"An image of shape {tuple(image.shape)} has no pixels.")
    if image.ndim not in (2, 3):
        raise ValueError(f"An image array has 2 or 3 axes (height, width, channels), got shape {tuple(image.shape)}.")
    is_tensor = isinstance(image, torch.Tensor)
    kind = str(image.dtype).removeprefix("torch.")
    is_float = image.dtype.is_floating_point if is_tensor else (image.dtype.kind == "f" or "float" in kind)
    if is_tensor:
        if image.device.type == "meta" or image.is_complex() or image.is_quantized:
            raise ValueError(f"An image tensor needs levels: {kind} on {image.device} has none.")
        image = image.detach().to_dense() if image.layout != torch.strided else image.detach()
    elif image.dtype.kind not in "biuf" and not is_float:
        raise ValueError(f"An image array holds numbers or truth values, got type {kind[:40]}.")
    if is_float:
        image = image.float() if is_tensor else np.ascontiguousarray(image, dtype=np.float32)
        if not (image.isfinite() if is_tensor else np.isfinite(image)).all():
            raise ValueError("An image of floats has pixels that are not finite numbers.")
        return image
    if kind != "uint8":
        image = image.to(torch.int64) if is_tensor else image.astype(np.int64)
        image = image * 255 if kind == "bool" else image
        low, high = int(image.min()), int(image.max())
        if low < 0 or high > 255:
            raise ValueError(f"Pixels of type {kind} must be 0..255, got {low}..{high}; divide 16-bit levels by 257.")
        return image.to(torch.uint8) if is_tensor else image.astype(np.uint8)
    # torch warns about read-only memory, and cannot read it backwards.
    return image if is_tensor else np.require(np.ascontiguousarray(image), requirements="W")


def to_rgb_channels(image: np.ndarray | torch.Tensor, input_data_format: Any = None) -> np.ndarray | torch.Tensor:
    """(H, W), (H, W, C) or (C, H, W) to (3, H, W): gray is repeated and alpha dropped, as for pictures.

    Where the first and the last axis could both be channels, the first is.

    Raises:
        ValueError: when no axis has 1 to 4 entries, or not the one that `input_data_format` names.
    """
    if image.ndim == 2:
        image = image[None]
    elif _channels_are_last(image.shape, input_data_format):
        image = image.movedim(-1, 0) if isinstance(image, torch.Tensor) else np.moveaxis(image, -1, 0)
    channels = image.shape[0]
    if channels not in RGB_CHANNELS + ALPHA_CHANNELS:
        raise ValueError(f"An image has 1 to 4 channels, got {channels}: shape {tuple(image.shape)}, channels first.")
    image = image[:3] if channels == 4 else image[:1] if channels == 2 else image
    if image.shape[0] == 1:
        image = image.expand(3, -1, -1) if isinstance(image, torch.Tensor) else np.repeat(image, 3, axis=0)
    return image.contiguous() if isinstance(image, torch.Tensor) else np.ascontiguousarray(image)


def _channels_are_last(shape: tuple[int, ...], input_data_format: Any) -> bool:
    if input_data_format is not None:
        return str(getattr(input_data_format, "value", input_data_format)).endswith("last")
    first, last = shape[0], shape[-1]
    if first in RGB_CHANNELS or last in RGB_CHANNELS:
        return first not in RGB_CHANNELS
    if first in ALPHA_CHANNELS or last in ALPHA_CHANNELS:
        return last in ALPHA_CHANNELS
    raise ValueError(f"No axis of an image of shape {tuple(shape)} can be its channels: 1 to 4, first or last.")


def check_levels(image: np.ndarray | torch.Tensor, do_rescale: bool, rescale_factor: float, do_normalize: bool) -> None:
    """Whether levels reach as far as the options say: 0..255, or floats of 0..1 with `do_rescale=False`.

    Floats of 0..1 that are to be rescaled are nearly black, which may be meant: they only warn.

    Raises:
        ValueError: naming the range, for floats outside it.
    """
    is_float = image.is_floating_point() if isinstance(image, torch.Tensor) else image.dtype.kind == "f"
    if not is_float:
        if do_normalize and not do_rescale:
            warnings.warn(
                "Pixels of 0..255 with do_rescale=False are normalized as if they were 0..1; leave do_rescale on.",
                stacklevel=3,
            )
        return
    low, high = float(image.min()), float(image.max())
    if not do_rescale:
        if do_normalize and (low < -SLACK or high > 1 + SLACK):
            raise ValueError(f"Floats must be 0..1 with do_rescale=False, got {low:.4g}..{high:.4g}.")
        return
    white = 1 / rescale_factor if rescale_factor else 255.0
    slack = SLACK if high <= 1 + SLACK else HALF_LEVEL
    if low < -slack or high > white + HALF_LEVEL:
        raise ValueError(
            f"Floats must be 0..{white:.4g}, or 0..1 with do_rescale=False; got {low:.4g}..{high:.4g}. "
            "Undo what was done to the image before."
        )
    if 0 < high <= 1 + SLACK < white:
        warnings.warn(
            f"An image of floats has levels {low:.3g}..{high:.3g}, read as 0..{white:.4g}, which is nearly black. "
            "Levels of 0..1 need do_rescale=False.",
            stacklevel=3,
        )

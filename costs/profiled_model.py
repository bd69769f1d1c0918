"""What `fusedvlm profile` counts and times: a variant, or the paper's size with random weights."""

import torch
from transformers import AutoConfig

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration
from fusedvlm.processing.image_processing_fusedvlm_views import count_views

from .counts import read_shapes
from .environment import choose_device, describe_environment
from .profile import Workload, profile, profile_table, time_every_count

PAPER_COUNTS = "1,8,16,32,64,128,256,384,512,768"

__all__ = [
    "Workload",
    "count_image_views",
    "describe_environment",
    "load_config",
    "load_model",
    "paper_config",
    "parse_counts",
    "profile",
    "profile_table",
    "read_shapes",
    "time_every_count",
]


def paper_config() -> FusedVLMConfig:
    """The paper's size with a dial up to 768."""
    numbers = [int(number) for number in PAPER_COUNTS.split(",")]
    return FusedVLMConfig(trained_num_visual_tokens=numbers, fuser_config={"vocab_size": 49408 + max(numbers) - 1})


def parse_counts(counts: str | None, config: FusedVLMConfig) -> list[int]:
    """Turn "1,8,64" into numbers; by default those trained, of a whole range the powers of two and its ends.

    Raises:
        ValueError: for anything else.
    """
    if counts is None:
        trained = sorted(set(config.trained_num_visual_tokens))
        is_range = len(trained) > 2 and trained == list(range(trained[0], trained[-1] + 1))
        return [m for m in trained if not is_range or m & (m - 1) == 0 or m in (trained[0], trained[-1])]
    try:
        return [int(part) for part in counts.split(",")]
    except ValueError:
        raise ValueError(
            f"--num-visual-tokens {counts!r} must be numbers with commas between them, e.g. 1,8,64."
        ) from None


def count_image_views(image_size: str, config: FusedVLMConfig) -> int:
    """Views of an image of WIDTHxHEIGHT. Raises `ValueError` when it is not of that form."""
    width, _, height = image_size.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"--image-size {image_size!r} must be WIDTHxHEIGHT, e.g. 640x480.")
    return count_views(int(height), int(width), config.vision_config.image_size, config.max_local_views)


def load_config(model: str) -> FusedVLMConfig:
    """The configuration of a variant's folder or repository."""
    return AutoConfig.from_pretrained(model)


def load_model(
    model: str | None, config: FusedVLMConfig, dtype: str, device: str | None
) -> FusedVLMForConditionalGeneration:
    """The variant, or random weights at the config's shapes."""
    if model is not None:
        loaded = FusedVLMForConditionalGeneration.from_pretrained(model)
    else:
        with torch.device(choose_device(device)):
            loaded = FusedVLMForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
    return loaded.to(choose_device(device)).eval()

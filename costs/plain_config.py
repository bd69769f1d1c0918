"""A variant's configuration read as plain JSON, without PyTorch, and its parameters counted by formula.

For what most variants are: the fused connector between a CLIP tower and an LLM of one of the families below, in a file
that states everything and where everything fits together. For any other file the answer is None, and the model itself
is built without memory (`meta_model.py`), which also says what is wrong with it. Both count alike, by test.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fusedvlm.files import read_json

# Attention biases by family: of queries, keys and values; of the output. None: as `attention_bias` says.
LLAMA_LIKE = {"llama": (None, None), "mistral": (False, False), "qwen2": (True, False)}
COUNTS = ("num_visual_tokens", "num_followup_visual_tokens", "max_local_views", "first_query_token_id")
FLAGS = ("fuse_question", "fusion_row_per_turn", "distinct_queries", "merge_views", "newline_token")
NAMES = (
    "text_model_name_or_path", "text_model_revision", "vision_model_name_or_path", "vision_model_revision",
)  # fmt: skip
SCALES = ("initializer_range", "projector_initializer_range", "logit_scale_init_value")
MOST = 1_000_000  # of anything counted here; what is above is for the careful way to refuse
UNSUPPORTED = ("lm_head_multiplier", "output_multiplier")


class PlainFused:
    """What `describe_config` asks the fused connector's class."""

    summary = None
    per_view = False

    @staticmethod
    def counts(config: Any) -> range:
        """Any m from 1 to the largest trained one."""
        return range(1, config.max_num_visual_tokens + 1)

    @staticmethod
    def describe(config: Any) -> dict[str, int]:
        """Size of the fusion decoder."""
        fuser = config.fuser_config
        return {
            "layers": fuser.num_hidden_layers,
            "width": fuser.hidden_size,
            "heads": fuser.num_attention_heads,
        }


def read_plainly(folder: str) -> SimpleNamespace | None:
    """What `describe_config` needs of the configuration in a folder; None where there is any doubt about it."""
    path = Path(folder).expanduser() / "config.json"
    try:
        raw = read_json(path) if path.is_file() else None
        return None if raw is None else _plain(raw)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # the careful way says what is wrong


def _plain(raw: Mapping[str, Any]) -> SimpleNamespace | None:
    if raw["model_type"] != "fusedvlm" or raw["connector"] != "fused" or raw["connector_config"] is not None:
        return None
    if raw["answer_config"] is not None:
        return None
    vision, fuser, text = (SimpleNamespace(**raw[f"{name}_config"]) for name in ("vision", "fuser", "text"))
    trained = raw["trained_num_visual_tokens"]
    config = SimpleNamespace(
        connector="fused",
        connector_class=PlainFused,
        vision_config=vision,
        fuser_config=fuser,
        text_config=text,
        trained_num_visual_tokens=trained,
        trained_num_visual_tokens_is_range=raw["trained_num_visual_tokens_is_range"],
        **{name: raw[name] for name in (*COUNTS, *FLAGS, *NAMES, *SCALES)},
    )
    if not _fits(config):
        return None
    grid = vision.image_size // vision.patch_size
    config.max_num_visual_tokens = max(trained)
    config.view_grid_size = (grid + 1) // 2 if config.merge_views else grid
    config.tokens_per_view = config.view_grid_size**2 + int(config.newline_token)
    is_tied = _flag(raw["tie_word_embeddings"]) or _flag(text.tie_word_embeddings)
    config.plain_parameters = _count(config, grid, is_tied)
    return config


def _fits(config: SimpleNamespace) -> bool:
    """Whether everything is of its kind and fits together, as `FusedVLMConfig` checks it."""
    vision, fuser, text, trained = (
        config.vision_config, config.fuser_config, config.text_config, config.trained_num_visual_tokens,
    )  # fmt: skip
    if vision.model_type != "clip_vision_model" or fuser.model_type != "fusedvlm_fuser":
        return False
    if text.model_type not in LLAMA_LIKE or any(hasattr(text, name) for name in UNSUPPORTED):
        return False
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    decoders = (*sizes, "num_key_value_heads", "vocab_size")
    numbers = [getattr(vision, name) for name in (*sizes, "image_size", "patch_size", "num_channels")]
    numbers += [getattr(part, name) for part in (fuser, text) for name in decoders]
    numbers += [config.num_visual_tokens, config.num_followup_visual_tokens, *trained]
    if not trained or not all(_is_count(number) for number in numbers):
        return False
    if not all(_is_count(value + 1) for value in (config.max_local_views, config.first_query_token_id)):
        return False
    names_fit = all(value is None or isinstance(value, str) for value in (getattr(config, name) for name in NAMES))
    flags_fit = all(isinstance(getattr(config, name), bool) for name in FLAGS)
    scales = [getattr(config, name) for name in SCALES]
    scales_fit = all(isinstance(value, (int, float)) and math.isfinite(value) for value in scales)
    largest = max(trained)
    return (
        names_fit
        and flags_fit
        and scales_fit
        and min(scales[:2]) >= 0
        and isinstance(config.trained_num_visual_tokens_is_range, bool | None)
        and vision.hidden_size == fuser.hidden_size
        and vision.patch_size <= vision.image_size
        and vision.image_size // vision.patch_size <= 4096
        and config.num_followup_visual_tokens <= config.num_visual_tokens <= largest
        and (not config.distinct_queries or largest <= fuser.vocab_size - config.first_query_token_id + 1)
        and all(part.hidden_size % part.num_attention_heads == 0 for part in (vision, fuser, text))
        and all(part.num_attention_heads % part.num_key_value_heads == 0 for part in (fuser, text))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is no truth value.")
    return value


def _count(config: SimpleNamespace, grid: int, is_tied: bool) -> dict[str, int]:
    """Parameters by group, as `count_parameters` names them."""
    vision, fuser, text = config.vision_config, config.fuser_config, config.text_config
    width = vision.hidden_size
    merge = 9 * width**2 * config.merge_views + width * config.newline_token
    return {
        "vision": _clip_tower(vision, grid) + merge,
        "fusion": _decoder(fuser, (None, None)),
        "projection": fuser.hidden_size * text.hidden_size,
        "language model": _decoder(text, LLAMA_LIKE[text.model_type])
        + (0 if is_tied else text.vocab_size * text.hidden_size),
    }


def _clip_tower(vision: SimpleNamespace, grid: int) -> int:
    width, inner = vision.hidden_size, vision.intermediate_size
    attention = 4 * (width**2 + width)
    layer = attention + 2 * 2 * width + 2 * width * inner + inner + width
    embeddings = width + vision.num_channels * width * vision.patch_size**2 + (grid**2 + 1) * width
    return embeddings + 2 * 2 * width + vision.num_hidden_layers * layer


def _decoder(part: SimpleNamespace, biases: tuple[bool | None, bool | None]) -> int:
    """A Llama without head."""
    width, inner = part.hidden_size, part.intermediate_size
    head = getattr(part, "head_dim", None) or width // part.num_attention_heads
    queries, keys = part.num_attention_heads * head, part.num_key_value_heads * head
    on_inputs, on_output = (_flag(part.attention_bias) if bias is None else bias for bias in biases)
    attention = width * (2 * queries + 2 * keys) + (queries + 2 * keys) * on_inputs + width * on_output
    mlp = 3 * width * inner + (2 * inner + width) * _flag(getattr(part, "mlp_bias", False))
    return part.vocab_size * width + part.num_hidden_layers * (attention + mlp + 2 * width) + width

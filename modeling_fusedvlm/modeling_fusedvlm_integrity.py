"""Refuse weights that do not belong to the configuration beside them, instead of answering from random numbers.

Three things are compared while a variant loads: the names and shapes of its tensors with those of the model, the
configuration with the one its weights were saved under (a record in the weights file, because flags such as
`fuse_question` leave no trace in any shape), and its values with finite numbers.
"""

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils

if TYPE_CHECKING:
    from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

from .modeling_fusedvlm_loading import open_weights

# Where the record stands in the metadata of a safetensors file.
RECORD_KEY = "fusedvlm_config"
SUB_CONFIGS = ("vision_config", "fuser_config", "text_config", "answer_config")
# What may change without the weights becoming wrong: the dial, names of sources, what only training or saving reads.
FREE_FIELDS = {
    "num_visual_tokens", "num_followup_visual_tokens", "trained_num_visual_tokens", "max_local_views",
    "trained_num_visual_tokens_is_range",
    "text_model_name_or_path", "text_model_revision", "vision_model_name_or_path", "vision_model_revision",
    "text_model_inside",
    "zero_large_answer_entries", "logit_scale_init_value", "projector_initializer_range", "initializer_range",
    "initializer_factor", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "dropout",
    "_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward", "is_encoder_decoder", "pretraining_tp", "quantization_config", "gradient_checkpointing",
    "max_position_embeddings", "image_mean", "image_std", "vision_use_head", "distributed_config",
}  # fmt: skip
# What weights of the fused connector were trained with whose record is older than the field.
BEFORE_THE_FIELD = {"fusion_row_per_turn": False}
# Of the LLM these are settings of generation; of the fusion decoder, `eos_token_id` is the row of every last query.
TEXT_FREE_FIELDS = FREE_FIELDS | {"bos_token_id", "eos_token_id", "pad_token_id", "forced_eos_token_id"}
STAGE_1_ONLY = re.compile(r"(model\.)?(answer_tower\.|answer_projection\.|image_projection\.|logit_scale$)")
# What a stage-1 checkpoint cannot have: stage 2 starts it anew.
STAGE_2_NEW = re.compile(r"(model\.)?projector\.")
LANGUAGE = re.compile(r"(model\.)?language_model\.|lm_head\.")
COUNTERS = re.compile(r"(^|\.)(position_ids|num_batches_tracked)$")
LAYER = re.compile(r"(?:model\.)?language_model\.(?:.*\.)?layers\.(\d+)\.")
ANYWAY = "Pass ignore_mismatched_sizes=True to load it all the same."


# -- the record ------------------------------------------------------------------------------------------------------


def trained_fields(config: PreTrainedConfig) -> dict:
    """What of a `FusedVLMConfig` decides the outputs of given weights, as plain data without names of folders."""
    fields = {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}
    for name in SUB_CONFIGS:
        if isinstance(fields.get(name), dict):
            fields[name] = _tower_fields(name, fields[name])
    return fields


def _tower_fields(name: str, fields: dict) -> dict:
    free = TEXT_FREE_FIELDS if name == "text_config" else FREE_FIELDS
    return {key: value for key, value in fields.items() if key not in free and not key.startswith("_")}


@contextmanager
def recording(config: PreTrainedConfig) -> Iterator[None]:
    """Write what the weights were trained with into every safetensors file that this thread saves inside the block."""
    original, thread = modeling_utils.safe_save_file, threading.get_ident()
    record = {RECORD_KEY: json.dumps(trained_fields(config), sort_keys=True, default=str)}

    def save_file(tensors: dict, filename: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
        if threading.get_ident() == thread:
            metadata = {**(metadata or {}), **record}
        original(tensors, filename, metadata=metadata)
        order_metadata(filename)

    # `save_pretrained` offers no way to add to the metadata it writes.
    modeling_utils.safe_save_file = save_file
    try:
        yield
    finally:
        modeling_utils.safe_save_file = original


def order_metadata(filename: str | os.PathLike) -> None:
    """Give the header of a weights file one order: safetensors writes metadata in a random one, and a family whose
    variants share their weights should share the file's checksum."""
    with open(filename, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # reordering keeps the length; anything else stays as it is
            file.seek(8)
            file.write(text.ljust(size))


def read_record(file: str) -> dict | None:
    """The record of a weights file; None for files without one, which older versions and other programs write."""
    if not str(file).endswith(".safetensors"):
        return None
    with open_weights(file) as weights:
        text = (weights.metadata() or {}).get(RECORD_KEY)
    return None if text is None else json.loads(text)


def record_differences(config: PreTrainedConfig, record: dict) -> list[str]:
    """One line per field of `config` that differs from a record, e.g. "fuse_question is False, trained with True"."""
    found = []
    if record.get("connector", "fused") == "fused":
        record = {**BEFORE_THE_FIELD, **record}
    for name, value in trained_fields(config).items():
        if name not in record or (name == "answer_config" and None in (value, record[name])):
            continue  # a field that the saving version did not have, or a stage without answers
        trained = record[name]
        if name in SUB_CONFIGS and isinstance(value, dict) and isinstance(trained, dict):
            trained = _as_built_now(name, getattr(config, name), trained)
            pairs = [(f"{name}.{key}", value.get(key), trained[key]) for key in sorted(trained) if key in value]
        else:
            pairs = [(name, value, trained)]
        found += [f"{field} is {_short(now)}, trained with {_short(then)}" for field, now, then in pairs if now != then]
    return found


def _as_built_now(name: str, config: PreTrainedConfig, fields: dict) -> dict:
    """A recorded tower as this version of transformers writes it, so that a change of notation is no difference."""
    # CODEPATH: a recorded tower of the same family, whose fields can be rebuilt; of another, it differs anyway.
    if fields.get("model_type") != config.model_type:
        return {"model_type": fields.get("model_type")}
    try:
        built = type(config).from_dict(dict(fields)).to_dict()
    except (TypeError, ValueError, AttributeError, KeyError):
        return fields
    return {key: value for key, value in _tower_fields(name, built).items() if key in fields}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check_record(config: PreTrainedConfig, checkpoint_files: list[str] | None, name: str | None, lenient: bool) -> None:
    """Compare a configuration with the record in its weights file, and look for trained tensors that are no floats.

    Raises:
        ValueError: naming the first field that differs, its value and the one the weights were trained with, or the
            first tensor of whole numbers, of which a model would be made without a word.
    """
    for file in [] if lenient else checkpoint_files or []:
        record = read_record(file)
        if record is not None and (found := record_differences(config, record)):
            raise _refusal(name, f"config.json disagrees with its weights: {found[0]}{_more(found)}")
        if whole := whole_numbers(file):
            raise _refusal(name, f"{whole[0]}{_more(whole)} holds whole numbers, no weights", anyway=False)


def whole_numbers(file: str) -> list[str]:
    """Names of tensors outside the LLM, which may be quantized, that hold integers or truth values; counters may."""
    if not str(file).endswith(".safetensors"):
        return []
    with open_weights(file) as weights:
        every = weights.keys()  # the file is no mapping, it cannot be iterated itself
        names = [name for name in every if not LANGUAGE.match(name) and not COUNTERS.search(name)]
        return [name for name in names if re.match(r"[IU]\d|BOOL", weights.get_slice(name).get_dtype())]


# -- names, shapes and values ----------------------------------------------------------------------------------------


def check_tensors(
    model: PreTrainedModel, loading_info: "LoadStateDictInfo", load_config: "LoadStateDictConfig"
) -> None:
    """Refuse a checkpoint that lacks tensors of the model, has others, or has them in another shape.

    A new model (no name, tensors handed over) may lack anything. A stage-1 checkpoint may lack the projection, and what
    only stage 1 has is left behind. The LLM's own repository may hold more than its decoder reads, but no more layers.

    Raises:
        ValueError: naming the first such tensor and counting the rest.
    """
    if load_config.pretrained_model_name_or_path is None or load_config.ignore_mismatched_sizes:
        return
    name = load_config.pretrained_model_name_or_path
    wrong = sorted(loading_info.mismatched_keys)
    if wrong:
        tensor, found, wanted = wrong[0]
        what = f"{tensor} has shape {list(found)}, config.json asks for {list(wanted)}"
        raise _refusal(name, what + _more(wrong))
    is_stage_1 = any(STAGE_1_ONLY.match(key) for key in loading_info.unexpected_keys)
    missing = _missing(model, loading_info, load_config.hf_quantizer is not None, is_stage_1)
    if missing:
        raise _refusal(name, f"the weights lack {missing[0]}{_more(missing)}")
    unexpected = _unexpected(model, loading_info)
    if unexpected:
        raise _refusal(name, f"{unexpected[0]}{_more(unexpected)} is in the weights, but in no part of the model")


def _missing(
    model: PreTrainedModel, loading_info: "LoadStateDictInfo", is_quantized: bool, is_stage_1: bool
) -> list[str]:
    lacking = set(loading_info.missing_keys)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if not {target, source} <= lacking:
            lacking -= {target, source}  # one of the two is enough
    patterns = _patterns(model, "_keys_to_ignore_on_load_missing")
    lacking = {key for key in lacking if not any(pattern.search(key) for pattern in patterns)}
    if is_quantized:  # its tensors have names of their own, and its loader checks them
        lacking = {key for key in lacking if not LANGUAGE.match(key)}
    if is_stage_1:
        lacking = {key for key in lacking if not STAGE_2_NEW.match(key)}
    return sorted(lacking)


def _unexpected(model: PreTrainedModel, loading_info: "LoadStateDictInfo") -> list[str]:
    patterns = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    patterns += [re.compile(r"rotary_emb\.inv_freq$"), re.compile(r"(^|\.)position_ids$")]  # buffers of old checkpoints
    is_whole = hasattr(model, "_has_llm") or hasattr(model, "answer_tower")
    num_layers = getattr(model.config.text_config, "num_hidden_layers", None)
    found = []
    for key in sorted(loading_info.unexpected_keys):
        if any(pattern.search(key) for pattern in patterns) or STAGE_1_ONLY.match(key):
            continue
        layer = LAYER.match(key)
        if layer and num_layers is not None:
            if int(layer[1]) >= num_layers and hasattr(model, "_has_llm"):
                found.append(key)
        elif not LANGUAGE.match(key) and (is_whole or not STAGE_2_NEW.match(key)):
            found.append(key)
    return found


def _patterns(model: PreTrainedModel, attribute: str) -> list[re.Pattern]:
    return [re.compile(pattern) for pattern in getattr(model, attribute, None) or []]


@torch.no_grad()
def check_finite(model: PreTrainedModel, name: str | None) -> None:
    """Refuse trained tensors with NaN or infinities; the LLM and what lies on disk are not looked at.

    A sum is read first: one pass without a copy, not finite as soon as one value is not.

    Raises:
        ValueError: naming the first such tensor.
    """
    sums: dict[torch.device, list[torch.Tensor]] = {}
    names: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for key, tensor in model.named_parameters():
        if LANGUAGE.match(key) or tensor.device.type == "meta" or not tensor.is_floating_point():
            continue
        local: Any = tensor
        local = local.to_local() if hasattr(tensor, "to_local") else tensor
        sums.setdefault(local.device, []).append(local.sum(dtype=torch.float32))
        names.setdefault(local.device, []).append((key, local))
    for device, values in sums.items():
        if torch.stack(values).isfinite().all():
            continue
        bad = [key for key, tensor in names[device] if not tensor.isfinite().all()]
        if bad:
            raise _refusal(name, f"{bad[0]}{_more(bad)} holds NaN or infinite numbers", anyway=False)


def _more(found: list) -> str:
    return "" if len(found) == 1 else f" (and {len(found) - 1} more)"


def _refusal(name: str | None, what: str, anyway: bool = True) -> ValueError:
    shown = str(name) if name is not None and len(str(name)) <= 60 else f"...{str(name)[-57:]}"
    return ValueError(f"{shown}: {what[:160]}. {ANYWAY}" if anyway else f"{shown}: {what[:180]}; it is damaged.")

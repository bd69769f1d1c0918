"""LoRA on the fusion module, the vision tower or the LLM, by named presets (peft).

An adapter is a few megabytes on top of a saved variant: it saves and loads on its own, and can be merged back.
"""

import os
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import LANGUAGE_PREFIX, VISION_PREFIXES

# Where each preset looks for linear layers; "fusion" is wherever the model's connector has them.
LORA_PRESETS = {
    "fusion": None,
    "vision": VISION_PREFIXES[0],
    "llm": LANGUAGE_PREFIX,
}


def lora_config(
    model: nn.Module,
    presets: str | Iterable[str],
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    train_also: Iterable[str] = (),
    **kwargs: Any,
) -> LoraConfig:
    """Settings that put an adapter on every linear layer of the named parts.

    Args:
        model: a FusedVLM model.
        presets: one or several of "fusion", "vision", "llm".
        rank, alpha, dropout: as in `peft.LoraConfig`.
        train_also: modules that learn whole and are saved with the adapter, e.g. `["model.projector"]`.
        kwargs: further fields of `peft.LoraConfig`, e.g. `use_dora=True`.

    Raises:
        ValueError: for an unknown preset, one that matches no linear layer of this model, or a missing module.
    """
    anchor(model)
    presets = [presets] if isinstance(presets, str) else list(presets)
    unknown = [preset for preset in presets if preset not in LORA_PRESETS]
    if unknown or not presets:
        raise ValueError(f"Unknown LoRA presets {unknown or presets}; presets are {', '.join(LORA_PRESETS)}.")
    names = {name for name, _ in model.named_modules()}
    if missing := [name for name in train_also if name not in names]:
        raise ValueError(f"train_also={missing} names no module of this model; modules are {sorted(_parts(names))}.")
    patterns = [_pattern(model, preset) for preset in presets]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(patterns),
        modules_to_save=list(train_also) or None,
        **kwargs,
    )


def add_lora(model: nn.Module, presets: str | Iterable[str], **kwargs: Any) -> PeftModel:
    """The model with fresh adapters (see `lora_config`); everything but them, and `train_also`, is fixed.

    Save it with `save_pretrained` and load it with `AutoModelForImageTextToText`, which finds the variant by itself, or
    merge it with `merge_and_unload`; a variant whose LLM had an adapter must then be saved with `merged=True`.

    Raises:
        ValueError: also for a model that has adapters, or was neither saved nor loaded, so that an adapter could not
            say what it belongs to.
    """
    if isinstance(model, PeftModel):
        raise ValueError("The model has adapters already; merge them (merge_and_unload) before adding others.")
    if not model.name_or_path:
        raise ValueError(
            "An adapter refers to the variant it was trained on, and this model comes from no folder or repository: "
            "save it with save_pretrained and load it with from_pretrained first."
        )
    return get_peft_model(model, lora_config(model, presets, **kwargs))


def anchor(model: nn.Module) -> None:
    """Let a model that was loaded from a folder know it by its whole path: an adapter names it, and is loaded from
    other working directories than it was made in."""
    name = getattr(model, "name_or_path", None)
    if name and os.path.isdir(name):
        model.name_or_path = os.path.abspath(name)


def _pattern(model: Any, preset: str) -> str:
    """Regular expression for the full names of a part's linear layers."""
    prefix = LORA_PRESETS[preset] or model.config.connector_class.lora_prefix
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    endings = sorted({name.rpartition(".")[2] for name in linear if name.startswith(prefix)})
    if not endings:
        raise ValueError(
            f"LoRA preset {preset!r} matches no module: {type(model).__name__} has no linear layers under {prefix}*; "
            f"it has some under {sorted(_parts(linear))}."
        )
    return rf"{prefix}(?:.+\.)?(?:{'|'.join(endings)})".replace("model.", r"model\.", 1)


def _parts(names: Iterable[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in names if name}

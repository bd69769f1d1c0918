"""Trainers of both stages, their arguments, the collator, and recipes that run whole stages."""

import importlib

# Public name -> module that defines it. Loaded on first use, so that command-line help stays instant.
_PUBLIC = {
    "LORA_PRESETS": "adapters",
    "add_lora": "adapters",
    "lora_config": "adapters",
    "ContrastiveArguments": "arguments",
    "FusedVLMArguments": "arguments",
    "GenerationArguments": "arguments",
    "ConversationCollator": "collators",
    "ContrastiveTrainer": "contrastive",
    "draw_num_visual_tokens": "elastic",
    "draw_per_sample": "elastic",
    "shrink_visual_tokens": "elastic",
    "GenerationTrainer": "generation",
    "STAGES": "parameter_groups",
    "group_parameters": "parameter_groups",
    "select_trainable": "parameter_groups",
    "Recipe": "recipes",
    "load_recipe": "recipes",
    "run_recipe": "train",
    "find_last_checkpoint": "checkpoints",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__

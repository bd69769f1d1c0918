"""Trainers of both stages, their arguments, the collator, and recipes that run whole stages."""

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use, so that command-line help stays instant.
_PUBLIC = {
    "LORA_PRESETS": ".adapters",
    "add_lora": ".adapters",
    "lora_config": ".adapters",
    "ContrastiveArguments": ".arguments",
    "FusedVLMArguments": ".arguments",
    "GenerationArguments": ".arguments",
    "ConversationCollator": ".collators",
    "ContrastiveTrainer": ".contrastive",
    "draw_num_visual_tokens": ".elastic",
    "draw_per_sample": ".elastic",
    "shrink_visual_tokens": ".elastic",
    "GenerationTrainer": ".generation",
    "STAGES": ".parameter_groups",
    "group_parameters": ".parameter_groups",
    "select_trainable": ".parameter_groups",
    "Recipe": ".recipes",
    "load_recipe": ".recipes",
    "run_recipe": ".train",
    "find_last_checkpoint": ".checkpoints",
}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

"""Trainers of both stages, their arguments, the collator, and recipes that run whole stages."""

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use, so that command-line help stays instant.
_PUBLIC = {
    "LORA_PRESETS": ".lora",
    "add_lora": ".lora",
    "lora_config": ".lora",
    "ContrastiveArguments": ".arguments",
    "FusedVLMArguments": ".arguments",
    "GenerationArguments": ".arguments",
    "ConversationCollator": ".collators",
    "ContrastiveTrainer": ".contrastive",
    "draw_num_visual_tokens": ".elastic",
    "draw_per_sample": ".elastic",
    "shrink_visual_tokens": ".elastic",
    "GenerationTrainer": ".generation",
    "MixtureEpochs": ".callbacks.mixture_epochs",
    "STAGES": ".parameter_groups",
    "group_parameters": ".parameter_groups",
    "select_trainable": ".parameter_groups",
    "Recipe": ".recipes.recipe_files",
    "load_recipe": ".recipes.recipe_files",
    "run_recipe": ".runs.train",
    "find_last_checkpoint": ".checkpoints",
}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

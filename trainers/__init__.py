"""Trainers of both stages, their arguments, the collator, and recipes that run whole stages."""

from typing import TYPE_CHECKING

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
    "FusedVLMGRPOTrainer": ".grpo",
    "GenerationTrainer": ".generation",
    "MixtureEpochs": ".callbacks.mixture_epochs",
    "STAGES": ".parameter_groups",
    "group_parameters": ".parameter_groups",
    "select_trainable": ".parameter_groups",
    "Recipe": ".recipes.recipe_files",
    "load_recipe": ".recipes.recipe_files",
    "run_recipe": ".runs.run_recipe",
    "find_last_checkpoint": ".checkpoints",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .arguments import (
        ContrastiveArguments as ContrastiveArguments,
        FusedVLMArguments as FusedVLMArguments,
        GenerationArguments as GenerationArguments,
    )
    from .callbacks.mixture_epochs import MixtureEpochs as MixtureEpochs
    from .checkpoints import find_last_checkpoint as find_last_checkpoint
    from .collators import ConversationCollator as ConversationCollator
    from .contrastive import ContrastiveTrainer as ContrastiveTrainer
    from .elastic import (
        draw_num_visual_tokens as draw_num_visual_tokens,
        draw_per_sample as draw_per_sample,
        shrink_visual_tokens as shrink_visual_tokens,
    )
    from .generation import GenerationTrainer as GenerationTrainer
    from .grpo import FusedVLMGRPOTrainer as FusedVLMGRPOTrainer
    from .lora import (
        LORA_PRESETS as LORA_PRESETS,
        add_lora as add_lora,
        lora_config as lora_config,
    )
    from .parameter_groups import (
        STAGES as STAGES,
        group_parameters as group_parameters,
        select_trainable as select_trainable,
    )
    from .recipes.recipe_files import (
        Recipe as Recipe,
        load_recipe as load_recipe,
    )
    from .runs.run_recipe import run_recipe as run_recipe
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

"""Trainers of both stages, their arguments, and the collator of the conversation format."""

from .arguments import ContrastiveArguments, FusedVLMArguments, GenerationArguments
from .collators import ConversationCollator
from .contrastive import ContrastiveTrainer
from .elastic import draw_num_visual_tokens, shrink_visual_tokens
from .generation import GenerationTrainer
from .parameter_groups import STAGES, group_parameters, select_trainable

__all__ = [
    "STAGES",
    "ContrastiveArguments",
    "ContrastiveTrainer",
    "ConversationCollator",
    "FusedVLMArguments",
    "GenerationArguments",
    "GenerationTrainer",
    "draw_num_visual_tokens",
    "group_parameters",
    "select_trainable",
    "shrink_visual_tokens",
]

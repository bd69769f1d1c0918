"""FusedVLM: vision-language models whose number of visual tokens is a dial."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

__version__ = "0.2.0"

# Public name -> module that defines it. Loaded on first use, so `import fusedvlm` and `fusedvlm --help` stay instant.
_PUBLIC = {
    "FusedVLMConfig": "fusedvlm.modeling_fusedvlm",
    "FusedVLMFuserConfig": "fusedvlm.modeling_fusedvlm",
    "FusedVLMModel": "fusedvlm.modeling_fusedvlm",
    "FusedVLMForConditionalGeneration": "fusedvlm.modeling_fusedvlm",
    "FusedVLMForContrastiveLearning": "fusedvlm.modeling_fusedvlm",
    "FusedVLMImageProcessor": "fusedvlm.processing",
    "FusedVLMImageProcessorPil": "fusedvlm.processing",
    "FusedVLMProcessor": "fusedvlm.processing",
    "ContrastiveArguments": "fusedvlm.trainers",
    "ContrastiveTrainer": "fusedvlm.trainers",
    "ConversationCollator": "fusedvlm.trainers",
    "GenerationArguments": "fusedvlm.trainers",
    "GenerationTrainer": "fusedvlm.trainers",
    "VisualChat": "fusedvlm.serving",
}

_PACKAGES = (
    "comparison", "conversion", "costs", "data", "evaluation", "hub_cards", "hub_double", "lab", "modeling_fusedvlm",
    "processing", "quickstart", "reducers", "scaling", "serving", "trainers",
)  # fmt: skip

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from fusedvlm.modeling_fusedvlm import (
        FusedVLMConfig as FusedVLMConfig,
        FusedVLMForConditionalGeneration as FusedVLMForConditionalGeneration,
        FusedVLMForContrastiveLearning as FusedVLMForContrastiveLearning,
        FusedVLMFuserConfig as FusedVLMFuserConfig,
        FusedVLMModel as FusedVLMModel,
    )
    from fusedvlm.processing import (
        FusedVLMImageProcessor as FusedVLMImageProcessor,
        FusedVLMImageProcessorPil as FusedVLMImageProcessorPil,
        FusedVLMProcessor as FusedVLMProcessor,
    )
    from fusedvlm.serving import VisualChat as VisualChat
    from fusedvlm.trainers import (
        ContrastiveArguments as ContrastiveArguments,
        ContrastiveTrainer as ContrastiveTrainer,
        ConversationCollator as ConversationCollator,
        GenerationArguments as GenerationArguments,
        GenerationTrainer as GenerationTrainer,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC, also=["__version__"], packages=_PACKAGES)

"""FusedVLM: vision-language models whose number of visual tokens is a dial."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use, so `import fusedvlm` and `fusedvlm --help` stay instant.
_PUBLIC = {
    "FusedVLMConfig": ".modeling_fusedvlm",
    "FusedVLMFuserConfig": ".modeling_fusedvlm",
    "FusedVLMModel": ".modeling_fusedvlm",
    "FusedVLMForConditionalGeneration": ".modeling_fusedvlm",
    "FusedVLMForContrastiveLearning": ".modeling_fusedvlm",
    "FusedVLMImageProcessor": ".processing",
    "FusedVLMImageProcessorPil": ".processing",
    "FusedVLMProcessor": ".processing",
    "ContrastiveArguments": ".trainers",
    "ContrastiveTrainer": ".trainers",
    "ConversationCollator": ".trainers",
    "GenerationArguments": ".trainers",
    "GenerationTrainer": ".trainers",
    "VisualChat": ".serving",
}

_PACKAGES = (
    "comparison", "conversion", "costs", "data", "evaluation", "hub_cards", "modeling_fusedvlm", "processing",
    "quickstart", "reducers", "scaling", "serving", "trainers",
)  # fmt: skip

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .modeling_fusedvlm import (
        FusedVLMConfig as FusedVLMConfig,
        FusedVLMForConditionalGeneration as FusedVLMForConditionalGeneration,
        FusedVLMForContrastiveLearning as FusedVLMForContrastiveLearning,
        FusedVLMFuserConfig as FusedVLMFuserConfig,
        FusedVLMModel as FusedVLMModel,
    )
    from .processing import (
        FusedVLMImageProcessor as FusedVLMImageProcessor,
        FusedVLMImageProcessorPil as FusedVLMImageProcessorPil,
        FusedVLMProcessor as FusedVLMProcessor,
    )
    from .serving import VisualChat as VisualChat
    from .trainers import (
        ContrastiveArguments as ContrastiveArguments,
        ContrastiveTrainer as ContrastiveTrainer,
        ConversationCollator as ConversationCollator,
        GenerationArguments as GenerationArguments,
        GenerationTrainer as GenerationTrainer,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC, also=["__version__"], packages=_PACKAGES)

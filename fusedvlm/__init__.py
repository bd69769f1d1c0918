"""FusedVLM: vision-language models whose number of visual tokens is a dial."""

import importlib

__version__ = "0.1.0"

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

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fusedvlm' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__

"""Configuration and models. Importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .configuration_fusedvlm import FusedVLMConfig, FusedVLMFuserConfig
from .modeling_fusedvlm import (
    FusedVLMForConditionalGeneration,
    FusedVLMForContrastiveLearning,
    FusedVLMFusionModel,
    FusedVLMModel,
    FusedVLMPreTrainedModel,
)

AutoConfig.register(FusedVLMConfig.model_type, FusedVLMConfig, exist_ok=True)
AutoModel.register(FusedVLMConfig, FusedVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(FusedVLMConfig, FusedVLMForConditionalGeneration, exist_ok=True)

__all__ = [
    "FusedVLMConfig",
    "FusedVLMForConditionalGeneration",
    "FusedVLMForContrastiveLearning",
    "FusedVLMFuserConfig",
    "FusedVLMFusionModel",
    "FusedVLMModel",
    "FusedVLMPreTrainedModel",
]

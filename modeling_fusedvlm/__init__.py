"""Configuration and models. Importing this package registers them with transformers' Auto classes."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from fusedvlm.lazy import late_function

from .configuration_fusedvlm import FusedVLMConfig, FusedVLMFuserConfig
from .modeling_fusedvlm import (
    FusedVLMEncoder,
    FusedVLMForConditionalGeneration,
    FusedVLMForContrastiveLearning,
    FusedVLMFusionModel,
    FusedVLMModel,
    FusedVLMPreTrainedModel,
)
from .modeling_fusedvlm_connector import FusedVLMConnector, register_connector
from .modeling_fusedvlm_loading import TOWER_LOADERS
from .open_clip_towers import load_open_clip_tower
from .own_connectors import load_connector, load_from_environment

TOWER_LOADERS["open_clip"] = load_open_clip_tower
# push_to_hub writes the package's card. A layer above plugs in here; code that travels to the Hub knows nothing of it.
plug: Any = FusedVLMPreTrainedModel
plug.push_to_hub = late_function("fusedvlm.hub_cards.push_to_hub", "push_model_to_hub")
plug._upload_modified_files = late_function("fusedvlm.hub_cards.push_to_hub", "upload_with_card")

AutoConfig.register(FusedVLMConfig.model_type, FusedVLMConfig, exist_ok=True)
AutoModel.register(FusedVLMConfig, FusedVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(FusedVLMConfig, FusedVLMForConditionalGeneration, exist_ok=True)

load_from_environment()

__all__ = [
    "FusedVLMConfig",
    "FusedVLMConnector",
    "FusedVLMEncoder",
    "FusedVLMForConditionalGeneration",
    "FusedVLMForContrastiveLearning",
    "FusedVLMFuserConfig",
    "FusedVLMFusionModel",
    "FusedVLMModel",
    "FusedVLMPreTrainedModel",
    "load_connector",
    "register_connector",
]

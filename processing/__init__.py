"""Images and text to model inputs. Importing this package registers the processors with transformers' Auto classes."""

from typing import Any

from transformers import AutoImageProcessor, AutoProcessor

from fusedvlm.lazy import late_function
from fusedvlm.modeling_fusedvlm import FusedVLMConfig

from .build_processor import build_processor, clip_query_tokenizer, default_chat_template, exactly_as_asked
from .image_processing_fusedvlm import FusedVLMImageProcessor
from .image_processing_pil_fusedvlm import FusedVLMImageProcessorPil
from .processing_fusedvlm import FusedVLMProcessor

# push_to_hub keeps the model's card: a layer above plugs in here.
plug: Any = FusedVLMProcessor
plug._upload_modified_files = late_function("fusedvlm.hub_cards.push_to_hub", "upload_with_card")

AutoImageProcessor.register(
    FusedVLMConfig,
    image_processor_classes={"torchvision": FusedVLMImageProcessor, "pil": FusedVLMImageProcessorPil},
    exist_ok=True,
)
AutoProcessor.register(FusedVLMConfig, FusedVLMProcessor, exist_ok=True)

__all__ = [
    "FusedVLMImageProcessor",
    "FusedVLMImageProcessorPil",
    "FusedVLMProcessor",
    "build_processor",
    "clip_query_tokenizer",
    "default_chat_template",
    "exactly_as_asked",
]

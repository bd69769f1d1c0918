"""All that vLLM is told about us, in its own registries."""

import asyncio
import json
import os
from typing import Any

from transformers import AutoConfig, AutoProcessor
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.processing import FusedVLMProcessor
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.serving.image_source import ImageLimits, check_pixels, read_image

from . import ARCHITECTURE, __name__ as PACKAGE

MODE = "fusedvlm"  # of tokenizer and renderer
LIMITS = "FUSEDVLM_IMAGE_LIMITS"  # environment: fields of ImageLimits as JSON


def register_all() -> None:
    """Fill the registries; doing it again changes nothing."""
    AutoConfig.register("fusedvlm", FusedVLMConfig, exist_ok=True)
    AutoProcessor.register(FusedVLMConfig, FusedVLMProcessor, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{PACKAGE}.vllm_model:{ARCHITECTURE}")
    if MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODE, f"{PACKAGE}.vllm_renderer", "FusedVLMRenderer")
        TokenizerRegistry.register(MODE, *TokenizerRegistry.tokenizers["hf"])
    MODELS_CONFIG_MAP[ARCHITECTURE] = _OwnRenderer
    MEDIA_CONNECTOR_REGISTRY.register(MODE)(CarefulConnector)


class _OwnRenderer(VerifyAndUpdateConfig):
    """Chooses our renderer for our models."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        model_config.tokenizer_mode = MODE


class CarefulConnector(MediaConnector):
    """Reads images as our own server does: bounded, from public https addresses and base64 alone, upright 8-bit RGB.

    Chosen by `VLLM_MEDIA_CONNECTOR=fusedvlm`, as `fusedvlm serve --engine vllm` does.
    """

    def fetch_image(self, image_url: str, *, image_mode: str = "RGB") -> Any:
        """A PIL image. Raises `ValueError` in one line, which the client gets."""
        limits = ImageLimits(**json.loads(os.environ.get(LIMITS, "{}")))
        found = read_image(image_url, limits)
        check_pixels(found.source, limits)
        return load_image(found.source)

    async def fetch_image_async(self, image_url: str, *, image_mode: str = "RGB") -> Any:
        """See `fetch_image`."""
        return await asyncio.to_thread(self.fetch_image, image_url, image_mode=image_mode)

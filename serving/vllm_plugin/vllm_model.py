"""The model in vLLM: our vision tower and connector before any language model that vLLM has.

By reference the language model's weights are read from its own repository, as a second source of weights; it may be
quantized there. Our encoder is not split: it is small, and every rank has it whole.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_encoder import FusedVLMVisualModel
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import LANGUAGE_PREFIX, resolve_text_model
from fusedvlm.serving.byte_cache import ByteCache, KnownImage
from fusedvlm.serving.visual_encoder import VisualEncoder

from .vllm_processing import FusedVLMDummyInputs, FusedVLMInfo, FusedVLMMultiModalProcessor

CACHE_MB = "FUSEDVLM_CACHE_MB"  # environment: megabytes of views, fusion states and visual tokens


class PixelEncoder(VisualEncoder):
    """An encoder whose images are views already: the source of a `KnownImage` is (V, 3, S, S)."""

    def see(self, images: list[KnownImage]) -> tuple[torch.Tensor, list[int]]:
        """(V, 3, S, S) of all images, and how many views each has."""
        return torch.cat([image.source for image in images]), [len(image.source) for image in images]


@MULTIMODAL_REGISTRY.register_processor(
    FusedVLMMultiModalProcessor, info=FusedVLMInfo, dummy_inputs=FusedVLMDummyInputs
)
class FusedVLMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """Visual tokens of ours, everything else of vLLM's own language model."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "encoder.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image in text that a template does not render."""
        return "<image>" if modality.startswith("image") else None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config: FusedVLMConfig = model_config.hf_config
        if config.fuse_question and config.connector_class.question_tokens == "llm":
            raise ValueError(f"The {config.connector} connector reads the question with the LLM; use another engine.")
        self.config = config
        marks: Any = self
        with marks._mark_tower_model(vllm_config, "image"):
            self.encoder = FusedVLMVisualModel(config).to(model_config.dtype).eval()
        with marks._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        if not holds_language_model(config, model_config.model):
            self.secondary_weights = [
                DefaultModelLoader.Source(
                    resolve_text_model(config, model_config.model), config.text_model_revision, prefix="language_model."
                )
            ]
        cache = ByteCache(int(os.environ.get(CACHE_MB, "512")) * 2**20)
        self.visual = PixelEncoder(self.encoder, None, cache)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names of the loaded parameters."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Per item (m, H): the visual tokens of the last of its questions."""
        pixel_values: Any = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        if isinstance(pixel_values, (list, tuple)):
            pixel_values = torch.cat(list(pixel_values))
        views = pixel_values.split(_flat(kwargs["image_num_views"]).tolist())
        keys = _flat(kwargs["image_key"]).reshape(len(views), -1).tolist()
        ids = _flat(kwargs["question_input_ids"]).tolist()
        counts = _flat(kwargs["num_visual_tokens"]).tolist()
        asked = []
        for length, m in zip(_flat(kwargs["question_lengths"]).tolist(), counts, strict=True):
            asked.append((tuple(ids[:length]), m))
            ids = ids[length:]
        items = []
        for number, count in enumerate(_flat(kwargs["image_num_questions"]).tolist()):
            items.append((KnownImage(bytes(keys[number]).hex(), views[number]), tuple(asked[:count])))
            asked = asked[count:]
        return self.visual.encode_items(items)

    def forward(
        self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        """The language model's states."""
        embeds = None if intermediate_tensors is not None else inputs_embeds
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The language model's logits; a placeholder is never generated, there is no visual token for it."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[..., self.config.image_token_id] = float("-inf")
        return logits

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are what, for adapters."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector=["encoder.fuser", "encoder.projector", "encoder.connector"],
            tower_model="encoder.vision_tower",
        )  # fmt: skip


def _flat(value: Any) -> torch.Tensor:
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    return torch.cat([part.reshape(-1) for part in parts])


def holds_language_model(config: FusedVLMConfig, source: str) -> bool:
    """Whether the language model's weights are in the variant: its configuration says, or else its local files."""
    if config.text_model_inside is not None or config.text_model_name_or_path is None:
        return bool(config.text_model_inside) or config.text_model_name_or_path is None
    for file in Path(source).glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()  # the file is no mapping, it cannot be iterated itself
            if any(name.startswith(LANGUAGE_PREFIX) for name in names):
                return True
    return False

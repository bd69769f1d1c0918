"""Images of a prompt to vLLM's items: one per placeholder, known by image, questions so far and m.

A later question about an image is an item of its own, with the same image: vLLM keeps the items of earlier turns, and
our encoder keeps what it knows of the image.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from fusedvlm.modeling_fusedvlm import FusedVLMConfig


class FusedVLMInfo(BaseProcessingInfo):
    """How many images there may be, and how many tokens each has at most."""

    def get_hf_config(self) -> FusedVLMConfig:
        """The variant's configuration."""
        return self.ctx.get_hf_config(FusedVLMConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The largest m, of every view where the connector counts by view."""
        config = self.get_hf_config()
        views = config.max_local_views + 1 if config.connector_class.per_view else 1
        return {"image": config.max_num_visual_tokens * views}


class FusedVLMDummyInputs(BaseDummyInputsBuilder[FusedVLMInfo]):
    """Images with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text: see `get_dummy_inputs` of the processor."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict:
        """Images of three views by three, which have as many views as the variant makes."""
        size = self.info.get_hf_config().vision_config.image_size * 3
        return {"image": self._get_dummy_images(width=size, height=size, num_images=mm_counts.get("image", 0))}


class FusedVLMMultiModalProcessor(BaseMultiModalProcessor[FusedVLMInfo]):
    """`hf_processor_mm_kwargs["segments"]` says which image stands at which placeholder, and what is asked of it."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        """One placeholder per image, asked with the largest m."""
        config, count = self.info.get_hf_config(), mm_counts.get("image", 0)
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        history = [([0] if config.fuse_question else [], config.max_num_visual_tokens)]
        return ProcessorInputs(
            prompt=[config.image_token_id] * count,
            mm_data_items=self.info.parse_mm_data(data, validate=False),
            hf_processor_mm_kwargs={"segments": [(image, history) for image in range(count)]},
        )

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """As the base class, with an item for every placeholder."""
        segments = inputs.hf_processor_mm_kwargs.get("segments")
        if segments is None:
            raise ValueError("FusedVLM needs chat messages or text: its visual tokens depend on the question.")
        images = inputs.mm_data_items["image"]
        uuids = (inputs.mm_uuid_items or {}).get("image")
        shown = [number for number, _ in segments]
        items = self.info.parse_mm_data({"image": [images.get(number) for number in shown]}, validate=False)
        return super().apply(
            replace(
                inputs,
                mm_data_items=items,
                mm_uuid_items=None if uuids is None else {"image": [uuids[number] for number in shown]},
            ),
            timing_ctx,
        )

    def _hash(self, **values: Any) -> str:
        return MultiModalHasher.hash_kwargs(self.info.ctx.get_mm_config().mm_hasher_algorithm, **values)

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        items = list(inputs.mm_data_items["image"].get_all_items_for_hash())
        uuids = (inputs.mm_uuid_items or {}).get("image") or [None] * len(items)
        segments = inputs.hf_processor_mm_kwargs["segments"]
        return {
            "image": [
                self._hash(model_id=self.info.model_id, image=uuid or item, asked=repr(history))
                for item, uuid, (_, history) in zip(items, uuids, segments, strict=True)
            ]
        }

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> dict:
        known = mm_is_cached.get("image", [])
        segments = inputs.hf_processor_mm_kwargs["segments"]
        return {"segments": [part for part, is_known in zip(segments, known, strict=True) if not is_known]}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        if not mm_items or not mm_items.get_all_counts().get("image"):
            return BatchFeature()
        processor, histories = self.info.get_hf_processor(), [history for _, history in hf_kwargs["segments"]]
        items = mm_items["image"]
        images = [items.get(number) for number in range(items.get_count())]
        data = processor.image_processor([getattr(image, "media", image) for image in images], return_tensors="pt")
        keys = [hashlib.sha256(self._hash(image=item).encode()).digest() for item in items.get_all_items_for_hash()]
        return BatchFeature(
            {
                "pixel_values": data["pixel_values"].to(self.info.ctx.model_config.dtype),
                "image_num_views": data["image_num_views"],
                "image_key": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
                "image_num_questions": torch.tensor([len(history) for history in histories]),
                "question_input_ids": torch.tensor(
                    [i for h in histories for ids, _ in h for i in ids], dtype=torch.long
                ),
                "question_lengths": torch.tensor([len(ids) for history in histories for ids, _ in history]),
                "num_visual_tokens": torch.tensor([m for history in histories for _, m in history]),
            }
        )

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]) -> dict:
        if "image_num_views" not in hf_inputs:
            return {}
        questions = hf_inputs["image_num_questions"]
        lengths = torch.stack([part.sum() for part in hf_inputs["question_lengths"].split(questions.tolist())])
        flat, one = MultiModalFieldConfig.flat_from_sizes, MultiModalFieldConfig.batched
        return {
            "pixel_values": flat("image", hf_inputs["image_num_views"]),
            "question_input_ids": flat("image", lengths, keep_on_cpu=True),
            "question_lengths": flat("image", questions, keep_on_cpu=True),
            "num_visual_tokens": flat("image", questions, keep_on_cpu=True),
            "image_num_views": one("image", keep_on_cpu=True),
            "image_num_questions": one("image", keep_on_cpu=True),
            "image_key": one("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> list:
        config = self.info.get_hf_config()
        token = config.image_token_id

        def placeholders(item: int) -> list[int]:
            data = out_mm_kwargs["image"][item]
            copies = int(data["image_num_views"].data) if config.connector_class.per_view else 1
            return [token] * (int(data["num_visual_tokens"].data[-1]) * copies)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]

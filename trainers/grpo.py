"""GRPO with HD views: TRL's trainer hands on one image per row, ours have several views and a question each.

TRL's `SFTTrainer` and `DPOTrainer` take our models as they are. `GRPOTrainer` passes on the processor fields it knows
by name; the packed ones (views per image, questions, visual tokens) are carried here, sample by sample.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl import GRPOTrainer
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from fusedvlm.processing.processing_fusedvlm import PACKED_NAMES

PACKED = ("pixel_values", *PACKED_NAMES)
REPLACED = ("pixel_values", "num_images", "num_tiles")


class FusedVLMGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` for `FusedVLMForConditionalGeneration`; arguments and dataset as there.

    Raises:
        ValueError: for generation with vLLM, which does not know the model, and for tools.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args")
        if getattr(config, "use_vllm", False) or getattr(config, "use_transformers_continuous_batching", False):
            raise ValueError("GRPO generates with transformers here: leave use_vllm and continuous batching off.")
        if kwargs.get("tools") or kwargs.get("environment_factory"):
            raise ValueError("GRPO with tools or environments is not supported for FusedVLM models.")
        super().__init__(*args, **kwargs)
        self._packed_rows: list[dict[str, torch.Tensor]] | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [self._pack(example) for example in inputs]
        if any(rows) and not all(rows):
            raise ValueError(
                f"{sum(map(bool, rows))} of {len(rows)} prompts of a batch show an image: TRL's GRPO takes batches "
                "with images in every prompt or in none; train on the two kinds one after the other."
            )
        self._packed_rows = rows
        with counting_views(self.processing_class):
            output = super()._generate_and_score_completions(inputs)
        if any(rows):
            output = {name: value for name, value in output.items() if name not in REPLACED}
            output["packed_rows"] = rows
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._packed_rows = inputs.get("packed_rows")
        return super()._compute_loss(model, inputs)

    def _pack(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Views and questions of one prompt; nothing when it shows no image."""
        images = example.get("images") or ([example["image"]] if example.get("image") is not None else [])
        if not images:
            return {}
        prompt = prepare_multimodal_messages(example["prompt"], images=images)
        processor: Any = self.processing_class
        options: Any = self.chat_template_kwargs
        text = apply_chat_template({"prompt": prompt}, processor, **options)["prompt"]
        batch = processor(images=[images], text=[text], return_tensors="pt")
        return {name: batch[name].to(self.accelerator.device) for name in PACKED if name in batch}

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **fields: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As TRL's, with the packed fields of each chunk in place of those it knows."""
        size = batch_size or len(input_ids)
        log_probs, entropies = [], []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            ids, mask = input_ids[rows], attention_mask[rows]
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :-logits_to_keep] = -100
            packed = concatenate((self._packed_rows or [])[rows])
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False, **packed
                )
            log_probs.append(outputs.log_probs[:, -logits_to_keep:])
            if compute_entropy:
                entropies.append(outputs.entropy[:, -logits_to_keep:])
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None


def concatenate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The packed fields of a batch of prompts: all are counted per image or per sample, one after the other."""
    return {name: torch.cat([row[name] for row in rows]) for name in (rows[0] if rows else {})}


@contextmanager
def counting_views(processor: Any) -> Iterator[None]:
    """Let the image processor answer what TRL asks models with tiles: how many an image has."""
    own = processor.image_processor

    class CountingViews:
        def __call__(self, images: Any, crop_to_patches: bool = False, **kwargs: Any) -> Any:
            flat = [image for row in images for image in (row or [])] if isinstance(images[0], list | None) else images
            batch = own(flat, **kwargs)
            if crop_to_patches:
                batch["num_patches"] = batch["image_num_views"]
            return batch

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    processor.image_processor = CountingViews()
    try:
        yield
    finally:
        processor.image_processor = own

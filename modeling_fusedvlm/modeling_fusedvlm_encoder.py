"""Images and questions to visual tokens, inside the whole model or alone: `FusedVLMEncoder` needs no LLM.

The encoder is what a server runs in front of an LLM that runs elsewhere: vision tower, connector, projection, and of
the LLM only the rows of its embedding table, so that it can write whole prompts as vectors.
Shape legend in `modeling_fusedvlm_fusion.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_fusedvlm import FusedVLMConfig
from .modeling_fusedvlm_counts import with_count
from .modeling_fusedvlm_fusion import FusedVLMFusionModel, FusedVLMKwargs
from .modeling_fusedvlm_rows import FusionPlan
from .modeling_fusedvlm_turns import has_later_turns


@dataclass
class FusedVLMImageFeatures(BaseModelOutputWithPooling):
    """Visual tokens, ready for the LLM.

    Args:
        pooler_output (`list[torch.Tensor]`): per conversation with images: (its visual tokens, H) in prompt order, that
            is by turn, then image. One entry per conversation, so that beam search repeats it as a whole.
        visual_tokens_per_sample (`list[int]`, *optional*): how many placeholders each conversation must have.
    """

    visual_tokens_per_sample: list | None = None


class FusedVLMVisualModel(FusedVLMFusionModel):
    """Vision tower and connector with its projection to the LLM's width."""

    _has_llm = True

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_num_views: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_lengths: torch.Tensor | None = None,
        question_turns: torch.Tensor | None = None,
        num_visual_tokens: torch.Tensor | int | None = None,
        image_num_questions: torch.Tensor | None = None,
        sample_num_images: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusedVLMImageFeatures:
        """Visual tokens of a batch, in the order in which the prompts have placeholders. Arguments as in `fuse`.

        `generate` calls this once, before beams are expanded. Pass the result on as
        `generate(..., mm_encoder_outputs={"image": features})` to reuse it. With `num_visual_tokens` (K, G) these are
        the features of K versions of the batch that differ in m alone, version after version, from one pass over the
        images: what a training step at several m needs (prompts (K x B, L)).
        """
        if isinstance(num_visual_tokens, torch.Tensor) and num_visual_tokens.ndim == 2:
            return self._features_of_versions(
                num_visual_tokens.tolist(),
                pixel_values=pixel_values,
                image_num_views=image_num_views,
                question_input_ids=question_input_ids,
                question_lengths=question_lengths,
                question_turns=question_turns,
                image_num_questions=image_num_questions,
                sample_num_images=sample_num_images,
                view_features=view_features,
                **kwargs,
            )
        fused, plan = self.fuse(
            pixel_values=pixel_values,
            image_num_views=image_num_views,
            question_input_ids=question_input_ids,
            question_lengths=question_lengths,
            question_turns=question_turns,
            num_visual_tokens=num_visual_tokens,
            image_num_questions=image_num_questions,
            sample_num_images=sample_num_images,
            view_features=view_features,
            **kwargs,
        )
        visual_tokens = []
        if fused.segment_states:
            counts = [len(states) for states in fused.segment_states]
            projected = self.connector.project(torch.cat(fused.segment_states)).split(counts)
            visual_tokens = [torch.cat([projected[g] for g in group]) for group in plan.segments_per_sample()]
        vision = fused.vision_outputs
        return FusedVLMImageFeatures(
            last_hidden_state=None if vision is None else vision.last_hidden_state,
            pooler_output=visual_tokens,  # type: ignore[arg-type]  # one tensor per conversation
            hidden_states=None if vision is None else vision.hidden_states,
            attentions=None if vision is None else vision.attentions,
            visual_tokens_per_sample=plan.visual_tokens_per_sample(),
        )

    def get_image_features_every_count(
        self, counts: Sequence[int], **inputs: Unpack[FusedVLMKwargs]
    ) -> dict[int, FusedVLMImageFeatures]:
        """`get_image_features` for every m of `counts` in one pass over images and questions; see `fuse_every_count`.

        Pass one on as `generate(..., mm_encoder_outputs={"image": features[m]})` with a prompt of m placeholders.

        Args:
            counts: every wanted m.
            inputs: as in `fuse`, without `num_visual_tokens`.

        Returns:
            {m: features}, in the order of `counts`.

        Raises:
            ValueError: as `fuse_every_count`; and for several questions about an image on a packed row, where later
                ones read earlier ones and their m.
        """
        segments, plan = self._every_count(counts, **inputs)
        return {
            count: _of_conversations([segment[number] for segment in segments], with_count(plan, count))
            for number, count in enumerate(counts)
        }

    def _features_of_versions(self, counts: list[list[int]], **inputs: Any) -> FusedVLMImageFeatures:
        wanted = sorted({count for version in counts for count in version})
        segments, plan = self._every_count(wanted, **inputs) if wanted else ([], None)
        if plan is None or len(counts[0]) != len(plan.segments):
            asked = 0 if plan is None else len(plan.segments)
            raise ValueError(f"num_visual_tokens has {len(counts[0])} entries per version for {asked} questions.")
        features: Any = FusedVLMImageFeatures(pooler_output=[], visual_tokens_per_sample=[])  # type: ignore[arg-type]
        for version in counts:
            chosen = [segment[wanted.index(count)] for segment, count in zip(segments, version, strict=True)]
            parts = [replace(part, num_visual_tokens=m) for part, m in zip(plan.segments, version, strict=True)]
            own: Any = _of_conversations(chosen, replace(plan, segments=parts))
            features.pooler_output += own.pooler_output
            features.visual_tokens_per_sample += own.visual_tokens_per_sample
        return features

    def _every_count(
        self, counts: Sequence[int], **inputs: Unpack[FusedVLMKwargs]
    ) -> tuple[list[list[torch.Tensor]], FusionPlan]:
        segments, plan = self.fuse_every_count(counts, **inputs)
        # CODEPATH: new variants read every turn on a row of its own, published ones behind the turns before it.
        if not self.config.fusion_row_per_turn and has_later_turns(plan):
            raise ValueError(
                "On this model's packed rows a second question reads the first one and its m, so its visual tokens "
                "depend on that one's m; ask get_image_features at each m, or give one question per image."
            )
        return segments, plan


def _of_conversations(segments: list[torch.Tensor], plan: FusionPlan) -> FusedVLMImageFeatures:
    """Features of the visual tokens of every segment, joined by conversation in prompt order."""
    groups = plan.segments_per_sample()
    return FusedVLMImageFeatures(
        pooler_output=[  # type: ignore[arg-type]  # one tensor per conversation
            torch.cat([segments[g] for g in group]) for group in groups
        ],
        visual_tokens_per_sample=plan.visual_tokens_per_sample(),
    )


class FusedVLMEncoder(FusedVLMVisualModel):
    """A variant without its LLM: of that, the embedding rows alone are loaded.

    `FusedVLMEncoder.from_pretrained(folder)` reads variants by reference (one tensor of the LLM's repository) and
    self-contained ones.

    Raises:
        ValueError: for connectors that read the question with the LLM itself.
    """

    _keys_to_ignore_on_load_unexpected = [r"language_model\.", r"^lm_head\."]

    def _init_parts(self, config: FusedVLMConfig) -> None:
        if config.fuse_question and config.connector_class.question_tokens == "llm":
            raise ValueError(
                f"The {config.connector} connector reads the question with the language model and cannot run without; "
                "serve this variant with --engine transformers."
            )
        with torch.device("meta"):
            language_model: PreTrainedModel = AutoModel.from_config(config.text_config)
        keep_embeddings(language_model)
        if torch.get_default_device().type != "meta":
            language_model.to_empty(device=torch.get_default_device())
        self.language_model = language_model

    def embed_prompt(self, input_ids: Sequence[int], visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """One prompt as the LLM's input.

        Args:
            input_ids: (L,) token ids with a placeholder for every visual token.
            visual_tokens: (tokens, H) of each segment, in prompt order.

        Returns:
            (L, H).

        Raises:
            ValueError: when placeholders and visual tokens differ in number.
        """
        return embed_prompt(self, input_ids, visual_tokens)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: without its LLM this is a part of a variant, not one."""
        raise ValueError("An encoder is a part of a variant; save FusedVLMForConditionalGeneration instead.")


def embed_prompt(model: Any, input_ids: Sequence[int], visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `FusedVLMEncoder.embed_prompt`; for any model that has the LLM's embeddings."""
    table = model.get_input_embeddings()
    ids = torch.tensor(list(input_ids), device=table.weight.device)
    embeds = table(ids)
    is_visual = ids == model.config.image_token_id
    found, given = int(is_visual.sum()), sum(len(tokens) for tokens in visual_tokens)
    if found != given:
        raise ValueError(f"The prompt has {found} placeholders, but {given} visual tokens were given.")
    if given:
        embeds = embeds.clone()
        embeds[is_visual] = torch.cat(list(visual_tokens)).to(embeds)
    return embeds


def keep_embeddings(language_model: PreTrainedModel) -> None:
    """Remove every module of an LLM but its input embeddings, which stay under their name."""
    embeddings = language_model.get_input_embeddings()
    name = next(name for name, module in language_model.named_modules() if module is embeddings)
    module: nn.Module = language_model
    for step in name.split("."):
        for other in [child for child in module._modules if child != step]:
            del module._modules[other]
        module = module._modules[step]  # type: ignore[assignment]


__all__ = ["FusedVLMEncoder", "FusedVLMImageFeatures", "FusedVLMVisualModel"]

"""The fusion model, which both training stages share: vision tower, merge of the patch grid, fusion decoder.

Shape legend
    B   conversations      L   prompt length        H   LLM width
    V   views              T   tokens per view      C   width of vision tower and fusion decoder
    I   images             G   segments: one question asked about one image
    m_g visual tokens of segment g (m for an image's first question, m' for later ones)
"""

from dataclasses import dataclass

import torch
from transformers import AutoModel, LlamaModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import ModelOutput

from .configuration_fusedvlm import FusedVLMConfig
from .modeling_fusedvlm_base import FusedVLMPreTrainedModel
from .modeling_fusedvlm_rows import build_fusion_plan, build_fusion_rows, query_token_ids
from .modeling_fusedvlm_views import FusedVLMViewMerger

# CLIP normalises only the class token on its own; here its final LayerNorm is applied to every token (fusedvlm's
# docs/reference.md, "Vision tower"). Towers of other families return normalised tokens.
TOWERS_TO_NORMALISE = ("clip_vision_model",)


@dataclass
class FusedVLMFusionOutput(ModelOutput):
    """States of the fusion decoder.

    Args:
        segment_states (`list[torch.Tensor]`): per segment, image-major: (m_g, C) states at its queries and eos.
        vision_outputs (`BaseModelOutputWithPooling`, *optional*): what the vision tower returned.
    """

    segment_states: list | None = None
    vision_outputs: ModelOutput | None = None


class FusedVLMFusionModel(FusedVLMPreTrainedModel):
    """Vision tower, merge and fusion decoder: what both training stages share, under the same parameter names."""

    def __init__(self, config: FusedVLMConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.merger = FusedVLMViewMerger(
            config.vision_config.hidden_size, config.merge_views, config.newline_token, config.initializer_range
        )
        self.fuser = LlamaModel._from_config(config.fuser_config)
        self._init_parts(config)
        self.post_init()

    def _init_parts(self, config: FusedVLMConfig) -> None:
        """Modules a subclass adds before `post_init`."""

    def get_view_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        """Encode views: vision tower, last norm, merge, newline (fusedvlm's docs/reference.md, "Vision tower").

        Args:
            pixel_values: (V, 3, S, S), normalised.

        Returns:
            (V, T, C) view tokens, and what the vision tower returned.
        """
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        tokens = outputs.last_hidden_state
        # CODEPATH: CLIP towers return tokens before their final LayerNorm; SigLIP towers after it.
        if self.config.vision_config.model_type in TOWERS_TO_NORMALISE:
            tokens = self.vision_tower.post_layernorm(tokens)
        grid = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return self.merger(tokens[:, -grid * grid :]), outputs

    def embed_segments(self, plan, question_input_ids: torch.Tensor | None, device) -> list[torch.Tensor]:
        """Embedded [question; queries; eos] of each segment, list of (question tokens + m_g, C)."""
        config = self.config
        questions = [None] * len(plan.segments)
        # CODEPATH: variants trained with vision + question + queries, or with vision + queries only.
        if config.fuse_question and question_input_ids is not None:
            lengths = [segment.num_question_tokens for segment in plan.segments]
            if sum(lengths) != len(question_input_ids):
                raise ValueError(
                    f"question_lengths={lengths} adds up to {sum(lengths)}, but question_input_ids has "
                    f"{len(question_input_ids)} tokens."
                )
            questions = question_input_ids.to(device, torch.long).split(lengths)
        ids = []
        for segment, question in zip(plan.segments, questions, strict=True):
            config.check_num_visual_tokens(segment.num_visual_tokens)
            queries = query_token_ids(
                segment.num_visual_tokens,
                config.first_query_token_id,
                config.fuser_config.eos_token_id,
                config.distinct_queries,
            )
            queries = torch.tensor(queries, device=device)
            ids.append(queries if question is None else torch.cat([question, queries]))
        lengths = [len(segment_ids) for segment_ids in ids]
        return list(self.fuser.embed_tokens(torch.cat(ids)).split(lengths))

    def fuse(
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
        **kwargs,
    ):
        """Run vision tower and fusion decoder.

        Args:
            pixel_values: (V, 3, S, S) all views of the batch, image after image.
            image_num_views: (I,) views of each image; one each when not given.
            question_input_ids: (sum of lengths,) question tokens of the query tokenizer, segment after segment.
            question_lengths: (G,) tokens of each question.
            question_turns: (G,) user turn of each question inside its conversation.
            num_visual_tokens: (G,) m or m' of each segment, or one number for all.
            image_num_questions: (I,) questions asked about each image.
            sample_num_images: (B,) images of each conversation, 0 for text only.
            view_features: (V, T, C) from `get_view_features`, instead of `pixel_values`.

        Returns:
            `(FusedVLMFusionOutput, FusionPlan)`.

        Raises:
            ValueError: when counts disagree or a token count is out of range; the message has the numbers.
        """
        if (pixel_values is None) == (view_features is None):
            raise ValueError("Give exactly one of pixel_values and view_features.")
        vision_outputs = None
        if view_features is None:
            view_features, vision_outputs = self.get_view_features(pixel_values, **kwargs)
        keep_questions = self.config.fuse_question and question_input_ids is not None
        plan = build_fusion_plan(
            len(view_features),
            self.config.num_visual_tokens,
            image_num_views,
            question_lengths,
            question_turns,
            num_visual_tokens,
            image_num_questions,
            sample_num_images,
        )
        if not plan.segments:
            return FusedVLMFusionOutput(segment_states=[], vision_outputs=vision_outputs), plan
        # Not the embedding's device: its weight may be offloaded.
        text_tokens = self.embed_segments(plan, question_input_ids, view_features.device)
        rows = build_fusion_rows(view_features.to(text_tokens[0]), text_tokens, plan, keep_questions)
        states = self.fuser(
            inputs_embeds=rows.embeds, attention_mask=rows.attention_mask, use_cache=False
        ).last_hidden_state
        segment_states = [states[row, start:stop] for row, start, stop in rows.spans]
        return FusedVLMFusionOutput(segment_states=segment_states, vision_outputs=vision_outputs), plan

    @torch.no_grad()
    def start_fusion(self, view_features: torch.Tensor) -> Cache:
        """Read one image's views into a key-value cache that any number of questions can continue.

        Args:
            view_features: (V, T, C) of one image.

        Returns:
            Cache of V x T positions. `copy.deepcopy` it to ask several first questions about the same image.
        """
        cache = DynamicCache(config=self.config.fuser_config)
        self.fuser(inputs_embeds=view_features.flatten(0, 1)[None], past_key_values=cache, use_cache=True)
        return cache

    @torch.no_grad()
    def continue_fusion(
        self, cache: Cache, question_input_ids: torch.Tensor | None, num_visual_tokens: int
    ) -> torch.Tensor:
        """Ask one more question about a cached image; costs only the question's tokens and the queries.

        Args:
            cache: from `start_fusion`, extended in place.
            question_input_ids: (length,) or None.
            num_visual_tokens: m or m'.

        Returns:
            (m, C) fusion states, equal to those of one pass over all questions (the decoder is causal).
        """
        length = 0 if question_input_ids is None else len(question_input_ids)
        plan = build_fusion_plan(1, num_visual_tokens, question_lengths=[length])
        embeds = self.embed_segments(plan, question_input_ids, cache.layers[0].keys.device)[0]
        states = self.fuser(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True).last_hidden_state
        return states[0, -num_visual_tokens:]

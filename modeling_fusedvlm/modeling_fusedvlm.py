"""FusedVLM: HD views -> vision tower -> merge -> causal fusion decoder -> m visual tokens -> frozen LLM.

Shape legend
    B   conversations      L   prompt length        H   LLM width
    V   views              T   tokens per view      C   width of vision tower and fusion decoder
    I   images             G   segments: one question asked about one image
    m_g visual tokens of segment g (m for an image's first question, m' for later ones)

Everything about images is packed on axis 0, so that joining samples is concatenation; no index crosses samples.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, CLIPTextModel, GenerationMixin, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_fusedvlm import FusedVLMConfig, FusedVLMFuserConfig
from .modeling_fusedvlm_fusion import FusedVLMViewMerger, build_fusion_plan, build_fusion_rows, query_token_ids
from .modeling_fusedvlm_loading import (
    find_image_token_id,
    is_language_key,
    load_generation_config,
    load_vision_tower,
    load_with_text_model,
    pinned_revision,
    quantise_only_llm,
)
from .modeling_fusedvlm_losses import contrastive_loss, identity_loss, zero_large_entries
from .modeling_fusedvlm_merge import placeholder_mask, scatter_visual_tokens

# CLIP normalises only the class token on its own; here its final LayerNorm is applied to every token (reference
# section 2). Towers of other families return normalised tokens.
TOWERS_TO_NORMALISE = ("clip_vision_model",)

AUTO_MAP = {
    "AutoConfig": "configuration_fusedvlm.FusedVLMConfig",
    "AutoModel": "modeling_fusedvlm.FusedVLMModel",
    "AutoModelForImageTextToText": "modeling_fusedvlm.FusedVLMForConditionalGeneration",
}


# Everything about images in a batch; see `FusedVLMFusionModel.fuse`.
IMAGE_INPUTS = (
    "pixel_values",
    "image_num_views",
    "question_input_ids",
    "question_lengths",
    "question_turns",
    "num_visual_tokens",
    "image_num_questions",
    "sample_num_images",
)


@dataclass
class FusedVLMFusionOutput(ModelOutput):
    """States of the fusion decoder.

    Args:
        segment_states (`list[torch.Tensor]`): per segment, image-major: (m_g, C) states at its queries and eos.
        vision_outputs (`BaseModelOutputWithPooling`, *optional*): what the vision tower returned.
    """

    segment_states: list | None = None
    vision_outputs: ModelOutput | None = None


@dataclass
class FusedVLMImageFeatures(BaseModelOutputWithPooling):
    """Visual tokens, ready for the LLM.

    Args:
        pooler_output (`list[torch.Tensor]`): per conversation with images: (its visual tokens, H) in prompt order, that
            is by turn, then image. One entry per conversation, so that beam search repeats it as a whole.
        visual_tokens_per_sample (`list[int]`, *optional*): how many placeholders each conversation must have.
    """

    visual_tokens_per_sample: list | None = None


@dataclass
class FusedVLMModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: list of (tokens, H) per conversation with images, None without images."""

    image_hidden_states: list | None = None


@dataclass
class FusedVLMCausalLMOutputWithPast(ModelOutput):
    """`loss` scalar; `logits` (B, L, vocabulary); `image_hidden_states` as in `FusedVLMModelOutputWithPast`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    image_hidden_states: list | None = None


@dataclass
class FusedVLMContrastiveOutput(ModelOutput):
    """Stage 1.

    Args:
        loss: contrastive_loss + identity_loss, with `return_loss=True`.
        contrastive_loss, identity_loss: its two parts (reference section 5).
        logits_per_image: (G, G) cosines, not scaled by the temperature, as published.
        logit_scale: scalar, exp of the learned log temperature.
        image_embeds: (G, projection_dim) unit rows, from the eos state of each question.
        answer_embeds: (G, projection_dim) unit rows.
        query_states: (sum m_g, C) fusion states at all queries and eos of the batch.
    """

    loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    identity_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    answer_embeds: torch.Tensor | None = None
    query_states: torch.Tensor | None = None


class FusedVLMProjector(nn.Linear):
    """Bias-free linear from fusion width to LLM width; a class of its own because its initial scale is (section 4)."""

    def __init__(self, config: FusedVLMConfig):
        super().__init__(config.fuser_config.hidden_size, config.text_config.hidden_size, bias=False)


class FusedVLMPreTrainedModel(PreTrainedModel):
    """Flags, initialisation, and loading or saving with the LLM as a reference."""

    config: FusedVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["FusedVLMViewMerger"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FusedVLMProjector):
            init.normal_(module.weight, std=self.config.projector_initializer_range)
            return
        super()._init_weights(module)
        if isinstance(module, FusedVLMViewMerger):
            module.reset_parameters()
        elif isinstance(module, FusedVLMForContrastiveLearning):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def freeze_text_model(self) -> None:
        """Stop gradients to the LLM and its head; what a reference points to must not be trained."""
        for name, parameter in self.named_parameters():
            if is_language_key(name) or name.startswith("language_model."):
                parameter.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, quantization_config=None, **kwargs):
        """Load a variant; the LLM comes from the repository it refers to, unless the variant is self-contained.

        `quantization_config` is applied to the LLM only: the trained modules keep their precision.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = quantise_only_llm(quantization_config)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if quantization_config is not None:
            # Only the frozen LLM is quantised; Trainer would otherwise refuse to train the rest.
            model.is_quantized = False
        return loaded

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # `expected_keys` is given only when an adapter is being loaded: then the files are the adapter's.
        # CODEPATH: variants by reference take their LLM from its own repository; merged ones have none to refer to.
        if model.config.text_model_name_or_path is None or expected_keys is not None or not hasattr(model, "_has_llm"):
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        return load_with_text_model(model, state_dict, checkpoint_files, load_config)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if model.config.text_model_name_or_path is not None:
            model.freeze_text_model()  # loading creates parameters anew, with gradients switched on
        return loading_info

    def save_pretrained(self, save_directory, merged: bool = False, state_dict: dict | None = None, **kwargs):
        """Write the trained parts and refer to the LLM by repo id and commit.

        Args:
            save_directory: folder, created when missing.
            merged: write the LLM too, as a self-contained copy. Always so for a model that refers to no LLM.
        """
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        # CODEPATH: variants by reference leave the LLM out; merged ones and models without a reference hold it.
        if merged or self.config.text_model_name_or_path is None:
            ignored, self._keys_to_ignore_on_save = self._keys_to_ignore_on_save, None
            try:
                return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            finally:
                self._keys_to_ignore_on_save = ignored
        state_dict = self.state_dict() if state_dict is None else state_dict
        trained = {name: tensor for name, tensor in state_dict.items() if not is_language_key(name)}
        kwargs["save_original_format"] = False  # a pre-quantised LLM would leave conversions that cannot be reverted
        quantizer, quantization_config = self.__dict__.pop("hf_quantizer", None), None
        if quantizer is not None:
            # The trained parts are not quantised, so the variant must not claim to be.
            quantization_config = self.config.__dict__.pop("quantization_config", None)
        try:
            return super().save_pretrained(save_directory, state_dict=trained, **kwargs)
        finally:
            if quantizer is not None:
                self.hf_quantizer = quantizer
                self.config.quantization_config = quantization_config

    def resize_token_embeddings(self, *args, **kwargs):
        """Refuse to resize an LLM that is only referred to: reloading it would not fit."""
        if self.config.text_model_name_or_path is not None and (args or kwargs.get("new_num_tokens") is not None):
            raise ValueError(
                f"The embeddings of {self.config.text_model_name_or_path} cannot be resized: the variant refers to "
                "that model and would not load again. Set config.text_model_name_or_path = None to keep an own copy."
            )
        return super().resize_token_embeddings(*args, **kwargs)


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
        """Encode views (reference section 2).

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
        """Run vision tower and fusion decoder (reference sections 2 and 3).

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


class FusedVLMModel(FusedVLMFusionModel):
    """Fusion model, projection and LLM decoder, without a language-model head."""

    _has_llm = True

    def _init_parts(self, config: FusedVLMConfig) -> None:
        self.projector = FusedVLMProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)

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
        `generate(..., mm_encoder_outputs={"image": features})` to reuse it.
        """
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
            projected = self.projector(torch.cat(fused.segment_states)).split(counts)
            visual_tokens = [torch.cat([projected[g] for g in group]) for group in plan.segments_per_sample()]
        vision = fused.vision_outputs
        return FusedVLMImageFeatures(
            last_hidden_state=None if vision is None else vision.last_hidden_state,
            pooler_output=visual_tokens,
            hidden_states=None if vision is None else vision.hidden_states,
            attentions=None if vision is None else vision.attentions,
            visual_tokens_per_sample=plan.visual_tokens_per_sample(),
        )

    def _gradient_anchor(self) -> torch.Tensor:
        """Zero that depends on every trained parameter, for training batches without images.

        Without it a text-only batch over a frozen LLM has no gradient at all, and data-parallel ranks wait for ever.
        """
        size = self.config.vision_config.image_size
        view = torch.zeros(1, 3, size, size, device=self.device)
        features = self.get_image_features(pixel_values=view, num_visual_tokens=1, return_dict=True)
        return features.pooler_output[0].sum() * 0.0

    def _merge_images(self, inputs_embeds, input_ids, features, past_key_values) -> torch.Tensor:
        image_token_id = self.config.image_token_id
        is_prefill = inputs_embeds.shape[1] > 1
        if features is not None:
            mask = placeholder_mask(input_ids, inputs_embeds, image_token_id, self.get_input_embeddings())
            has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
            if has_past and not mask.any():
                return inputs_embeds  # the images entered with an earlier part of the prompt
            return scatter_visual_tokens(
                inputs_embeds, mask, features.pooler_output, features.get("visual_tokens_per_sample")
            )
        if input_ids is not None and is_prefill:
            torch_compilable_check(
                ~(input_ids == image_token_id).any(),
                "The prompt has image placeholders but no images were given: expected 0 in every sample.",
            )
        if self.training and torch.is_grad_enabled() and self.projector.weight.requires_grad:
            inputs_embeds = inputs_embeds + self._gradient_anchor().to(inputs_embeds)
        return inputs_embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_num_views: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_lengths: torch.Tensor | None = None,
        question_turns: torch.Tensor | None = None,
        num_visual_tokens: torch.Tensor | int | None = None,
        image_num_questions: torch.Tensor | None = None,
        sample_num_images: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusedVLMModelOutputWithPast:
        """Prompt (B, L) and images to the LLM's last hidden states (B, L, H). Image arguments as in `fuse`.

        Raises:
            ValueError: when a sample's placeholders and visual tokens differ, naming the sample and both counts.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        has_images = pixel_values is not None or view_features is not None
        features = (mm_encoder_outputs or {}).get("image")
        if has_images and features is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if has_images:
            features = self.get_image_features(
                pixel_values=pixel_values,
                image_num_views=image_num_views,
                question_input_ids=question_input_ids,
                question_lengths=question_lengths,
                question_turns=question_turns,
                num_visual_tokens=num_visual_tokens,
                image_num_questions=image_num_questions,
                sample_num_images=sample_num_images,
                view_features=view_features,
                return_dict=True,
            )
        inputs_embeds = self._merge_images(inputs_embeds, input_ids, features, past_key_values)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return FusedVLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if features is None else features.pooler_output,
        )


def scale_logits(logits: torch.Tensor, text_config) -> torch.Tensor:
    """Apply the logit rescaling of LLM families that have one: cap (Gemma 2), factor (Cohere), divisor (Granite)."""
    if (factor := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class FusedVLMForConditionalGeneration(FusedVLMPreTrainedModel, GenerationMixin):
    """The model that answers: `FusedVLMModel` with the LLM's head."""

    _has_llm = True
    # A stage-1 checkpoint loads by name; what only stage 1 has is left behind.
    _keys_to_ignore_on_load_unexpected = [
        r"^answer_tower\.",
        r"^answer_projection\.",
        r"^image_projection\.",
        "logit_scale",
    ]
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: FusedVLMConfig):
        super().__init__(config)
        self.model = FusedVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # CODEPATH: variants by reference; a merged copy or a fresh config has no reference.
        if config.text_model_name_or_path is not None:
            self.freeze_text_model()
            # Trainer accepts a checkpoint that lacks exactly these when it resumes.
            self._keys_to_ignore_on_save = {name for name in self.state_dict() if is_language_key(name)}
        # A generated placeholder would ask for a visual token that does not exist (without a cache, or when prompt
        # lookup proposes one).
        self.generation_config.suppress_tokens = [config.image_token_id]

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's head."""
        return self.lm_head

    def get_image_features(self, *args, **kwargs) -> FusedVLMImageFeatures:
        """See `FusedVLMModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """As `GenerationMixin.generate`; images are encoded once, before beams multiply the prompts."""
        # transformers 5.16 does not do that by itself, it would repeat the packed image inputs row by row.
        if not hasattr(self, "_prepare_multimodal_encoder_kwargs_for_generation"):
            given = {name: kwargs.pop(name) for name in IMAGE_INPUTS if kwargs.get(name) is not None}
            if "pixel_values" in given:
                with torch.no_grad():
                    features = self.model.get_image_features(return_dict=True, **given)
                kwargs["mm_encoder_outputs"] = {"image": features}
        return super().generate(*args, **kwargs)

    # `inputs_embeds` is named because `generate` looks for it in this signature.
    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, mm_encoder_outputs=None, **kwargs
    ) -> dict:
        """As the base class, but an assistant model's first step keeps its images; transformers drops them there."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        if mm_encoder_outputs and past_key_values is not None and past_key_values.get_seq_length() == 0:
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return inputs

    @classmethod
    def from_backbones(
        cls,
        vision,
        text,
        *,
        num_visual_tokens: int = 256,
        query_vocab_size: int = 49408,
        query_eos_token_id: int = 49407,
        fuser_config: dict | None = None,
        image_token_id: int | None = None,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        **config_kwargs,
    ):
        """Assemble a new variant from an existing vision tower and an existing LLM.

        Args:
            vision: repo id or folder of a CLIP or SigLIP (whole or tower), or a tower model.
            text: repo id or folder of a causal LM; kept frozen and referred to, not copied, on save.
            num_visual_tokens: m; also the largest m unless `trained_num_visual_tokens` is given.
            query_vocab_size: size of the query tokenizer's vocabulary (CLIP BPE: 49408); queries get the next rows.
            query_eos_token_id: row of the last query of every group (CLIP BPE: 49407).
            fuser_config: overrides of the fusion decoder's config, e.g. `{"num_hidden_layers": 12}`.
            image_token_id: placeholder in the LLM's vocabulary; by default a reserved token of its tokenizer.
            vision_revision, text_revision: commits, tags or branches; the commit they resolve to is stored.
            config_kwargs: further fields of `FusedVLMConfig`.

        Raises:
            ValueError: when widths disagree or the LLM's tokenizer has no reserved token for placeholders.
        """
        from transformers import AutoConfig

        text = str(text)
        vision_name = None if isinstance(vision, PreTrainedModel) else str(vision)
        tower = load_vision_tower(vision if vision_name is None else vision_name, vision_revision)
        vision_config = tower.config
        text_config = AutoConfig.from_pretrained(text, revision=text_revision)
        trained = config_kwargs.setdefault("trained_num_visual_tokens", [num_visual_tokens])
        fuser = {
            "hidden_size": vision_config.hidden_size,
            "intermediate_size": vision_config.intermediate_size,
            "num_attention_heads": max(1, vision_config.hidden_size // 64),
            "vocab_size": query_vocab_size + max(trained) - 1,
            "eos_token_id": query_eos_token_id,
            **(fuser_config or {}),
        }
        if image_token_id is None:
            image_token_id = find_image_token_id(text, text_revision)
        config = cls.config_class(
            vision_config=vision_config.to_dict(),
            fuser_config=FusedVLMFuserConfig(**fuser).to_dict(),
            text_config=text_config.to_dict(),
            num_visual_tokens=num_visual_tokens,
            first_query_token_id=query_vocab_size,
            image_token_id=image_token_id,
            text_model_name_or_path=text,
            text_model_revision=pinned_revision(text, text_revision),
            vision_model_name_or_path=vision_name,
            vision_model_revision=pinned_revision(vision_name, vision_revision),
            **config_kwargs,
        )
        wanted = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
        # CODEPATH: SigLIP towers, whose pooling head is not built here.
        if not getattr(config.vision_config, "vision_use_head", True):
            wanted = {name: tensor for name, tensor in wanted.items() if ".vision_tower.head." not in name}
        model = cls.from_pretrained(None, config=config, state_dict=wanted, dtype=dtype)
        model.config.name_or_path = ""
        settings = load_generation_config(text, text_revision, image_token_id)
        if settings is not None:
            model.generation_config = settings
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_num_views: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_lengths: torch.Tensor | None = None,
        question_turns: torch.Tensor | None = None,
        num_visual_tokens: torch.Tensor | int | None = None,
        image_num_questions: torch.Tensor | None = None,
        sample_num_images: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusedVLMCausalLMOutputWithPast:
        """Prompt (B, L) and images to logits (B, L, vocabulary), with a loss when `labels` (B, L) are given.

        Labels are aligned with `input_ids` (the shift happens inside), -100 where nothing is to be learned. Image
        arguments as in `FusedVLMFusionModel.fuse`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_num_views=image_num_views,
            question_input_ids=question_input_ids,
            question_lengths=question_lengths,
            question_turns=question_turns,
            num_visual_tokens=num_visual_tokens,
            image_num_questions=image_num_questions,
            sample_num_images=sample_num_images,
            view_features=view_features,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(hidden_states[:, keep, :]), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return FusedVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


class FusedVLMForContrastiveLearning(FusedVLMPreTrainedModel):
    """Stage 1: the eos state of question k against the answer tower's eos state of answer k (reference section 5)."""

    main_input_name = "pixel_values"

    def __init__(self, config: FusedVLMConfig):
        super().__init__(config)
        if config.answer_config is None:
            raise ValueError("Stage 1 reads answers with a text tower: set answer_config (a CLIPTextConfig).")
        self.model = FusedVLMFusionModel(config)
        self.answer_tower = CLIPTextModel._from_config(config.answer_config)
        self.answer_projection = nn.Linear(config.answer_config.hidden_size, config.projection_dim, bias=False)
        self.image_projection = nn.Linear(config.fuser_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_answer_embeds(self, answer_input_ids: torch.Tensor, answer_attention_mask: torch.Tensor) -> torch.Tensor:
        """Answers (G, La), right-padded and each ended by an eos, to unit rows (G, projection_dim)."""
        states = self.answer_tower(
            input_ids=answer_input_ids, attention_mask=answer_attention_mask, return_dict=True
        ).last_hidden_state
        last = answer_attention_mask.sum(-1) - 1
        pooled = states[torch.arange(len(states), device=states.device), last]
        projected = self.answer_projection(pooled)
        # CODEPATH: published stage-1 checkpoints, for conformance.
        if self.config.zero_large_answer_entries:
            projected = zero_large_entries(projected)
        return nn.functional.normalize(projected, dim=-1)

    @can_return_tuple
    def forward(
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
        answer_input_ids: torch.Tensor | None = None,
        answer_attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusedVLMContrastiveOutput:
        """Image arguments as in `FusedVLMFusionModel.fuse`; one answer per segment, in segment order.

        Raises:
            ValueError: when the numbers of questions and answers differ.
        """
        fused, _ = self.model.fuse(
            pixel_values=pixel_values,
            image_num_views=image_num_views,
            question_input_ids=question_input_ids,
            question_lengths=question_lengths,
            question_turns=question_turns,
            num_visual_tokens=num_visual_tokens,
            image_num_questions=image_num_questions,
            sample_num_images=sample_num_images,
            view_features=view_features,
        )
        if len(fused.segment_states) != len(answer_input_ids):
            raise ValueError(f"{len(fused.segment_states)} questions but {len(answer_input_ids)} answers.")
        eos_states = torch.stack([states[-1] for states in fused.segment_states])
        image_embeds = nn.functional.normalize(self.image_projection(eos_states), dim=-1)
        answer_embeds = self.get_answer_embeds(answer_input_ids, answer_attention_mask)
        query_states = torch.cat(fused.segment_states)
        output = FusedVLMContrastiveOutput(
            logits_per_image=image_embeds @ answer_embeds.T,
            logit_scale=self.logit_scale.exp(),
            image_embeds=image_embeds,
            answer_embeds=answer_embeds,
            query_states=query_states,
        )
        if return_loss:
            output.contrastive_loss = contrastive_loss(image_embeds, answer_embeds, output.logit_scale)
            output.identity_loss = identity_loss(query_states)
            output.loss = output.contrastive_loss + output.identity_loss
        return output


FusedVLMModel.register_for_auto_class("AutoModel")
FusedVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "FusedVLMForConditionalGeneration",
    "FusedVLMForContrastiveLearning",
    "FusedVLMFusionModel",
    "FusedVLMModel",
    "FusedVLMPreTrainedModel",
]

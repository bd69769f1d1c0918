"""What both training stages share: flags, initialisation, loading and saving, and the fusion model itself.

Shape legend
    B   conversations      L   prompt length        H   LLM width
    V   views              T   tokens per view      C   width of vision tower and fusion decoder
    I   images             G   segments: one question asked about one image
    m_g visual tokens of segment g (m for an image's first question, m' for later ones)
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import ModelOutput

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

# CLIP normalises only the class token on its own; here its final LayerNorm is applied to every token (reference
# section 2). Towers of other families return normalised tokens.
TOWERS_TO_NORMALISE = ("clip_vision_model",)

AUTO_MAP = {
    "AutoConfig": "configuration_fusedvlm.FusedVLMConfig",
    "AutoModel": "modeling_fusedvlm.FusedVLMModel",
    "AutoModelForImageTextToText": "modeling_fusedvlm.FusedVLMForConditionalGeneration",
}


@dataclass
class FusedVLMFusionOutput(ModelOutput):
    """States of the fusion decoder.

    Args:
        segment_states (`list[torch.Tensor]`): per segment, image-major: (m_g, C) states at its queries and eos.
        vision_outputs (`BaseModelOutputWithPooling`, *optional*): what the vision tower returned.
    """

    segment_states: list | None = None
    vision_outputs: ModelOutput | None = None


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
        if hasattr(model, "suppress_placeholder"):
            model.suppress_placeholder()  # the generation settings of a file, or none, have replaced the model's own
        if quantization_config is not None:
            # Only the frozen LLM is quantised; Trainer would otherwise refuse to train the rest.
            model.is_quantized = False
        return loaded

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
        """Assemble a new model of either stage from an existing vision tower and an existing LLM.

        Stage 1 only refers to the LLM, which is not loaded; give it an `answer_config`.

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
        model.name_or_path = model.config.name_or_path = ""
        settings = load_generation_config(text, text_revision, image_token_id) if model.can_generate() else None
        if settings is not None:
            model.generation_config = settings
        return model

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

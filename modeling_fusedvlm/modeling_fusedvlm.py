"""FusedVLM: HD views -> vision tower -> merge -> causal fusion decoder -> m visual tokens -> frozen LLM.

Shape legend
    B   conversations      L   prompt length        H   LLM width
    V   views              T   tokens per view      C   width of vision tower and fusion decoder
    I   images             G   segments: one question asked about one image
    m_g visual tokens of segment g (m for an image's first question, m' for later ones)

Everything about images is packed on axis 0, so that joining samples is concatenation; no index crosses samples.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    __version__ as transformers_version,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_fusedvlm import FusedVLMConfig
from .modeling_fusedvlm_base import FusedVLMPreTrainedModel
from .modeling_fusedvlm_contrastive import FusedVLMForContrastiveLearning
from .modeling_fusedvlm_encoder import FusedVLMEncoder, FusedVLMImageFeatures, FusedVLMVisualModel
from .modeling_fusedvlm_fusion import FusedVLMFusionModel, FusedVLMKwargs, split_image_inputs
from .modeling_fusedvlm_loading import is_language_key
from .modeling_fusedvlm_placeholders import (
    SuppressingLogitsProcessorList,
    placeholder_mask,
    refuse_placeholders,
    repeat_features,
    scatter_visual_tokens,
)

if not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"):
    # Older versions would repeat the packed images row by row, and give beams the wrong ones.
    raise ImportError(
        f"FusedVLM needs transformers 5.18 or newer, this is {transformers_version}: update transformers."
    )


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


class FusedVLMModel(FusedVLMVisualModel):
    """Fusion model and LLM decoder, without a language-model head."""

    def _init_parts(self, config: FusedVLMConfig) -> None:
        self.language_model = AutoModel.from_config(config.text_config)

    def _gradient_anchor(self) -> torch.Tensor:
        """Zero that depends on every trained parameter, for training batches without images.

        Without it a text-only batch over a frozen LLM has no gradient at all, and data-parallel ranks wait for ever.
        """
        size = self.config.vision_config.image_size
        view = torch.zeros(1, 3, size, size, device=self.device)
        smallest = min(self.connector.counts(self.config))
        features = self.get_image_features(
            pixel_values=view,
            num_visual_tokens=smallest,
            return_dict=True,
            **self.connector.dummy_question(self.device),
        )
        return features.pooler_output[0].sum() * 0.0

    def _connector_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.connector_parameters())

    def _merge_images(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        features: Any,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        is_step = past_key_values is not None and inputs_embeds.shape[1] == 1
        if is_step and features is None and not self.training:
            return inputs_embeds  # one more token of an answer, which is never a placeholder
        image_token_id, embed_tokens = self.config.image_token_id, self.get_input_embeddings()
        if features is not None:
            has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
            mask = placeholder_mask(input_ids, inputs_embeds, image_token_id, embed_tokens)
            if has_past and not mask.any():
                return inputs_embeds  # the images entered with an earlier part of the prompt
            return scatter_visual_tokens(
                inputs_embeds, mask, features.pooler_output, features.get("visual_tokens_per_sample")
            )
        if not is_step:
            refuse_placeholders(input_ids, inputs_embeds, image_token_id, embed_tokens)
        if self.training and torch.is_grad_enabled() and self._connector_learns():
            inputs_embeds = inputs_embeds + self._gradient_anchor().to(inputs_embeds)
        return inputs_embeds

    @can_return_tuple
    def forward(  # type: ignore[misc]  # transformers names position_ids among its keywords, too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs: Unpack[FusedVLMKwargs],
    ) -> FusedVLMModelOutputWithPast:
        """Prompt (B, L) and images (see `FusedVLMImageInputs`) to the LLM's last hidden states (B, L, H).

        Raises:
            ValueError: when a sample's placeholders and visual tokens differ, naming the sample and both counts.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        images, kwargs = split_image_inputs(kwargs)
        has_images = images.get("pixel_values") is not None or images.get("view_features") is not None
        features = (mm_encoder_outputs or {}).get("image")
        if has_images and features is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if has_images:
            features = self.get_image_features(**images, return_dict=True)
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


def scale_logits(logits: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """Apply the logit rescaling of LLM families that have one: cap (Gemma 2), factor (Cohere), divisor (Granite)."""
    if (factor := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def labeled_states(hidden_states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, H) states and (B, L) labels to the (n, H) states that predict a labeled token, and those n tokens."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    is_labeled = following != -100
    return hidden_states[is_labeled], following[is_labeled]


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

    if TYPE_CHECKING:  # checkers find no model that the protocol of transformers' own annotation fits

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def __init__(self, config: FusedVLMConfig) -> None:
        super().__init__(config)
        self.model = FusedVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # CODEPATH: variants by reference; a merged copy or a fresh config has no reference.
        if config.text_model_name_or_path is not None:
            self.freeze_text_model()
            # Trainer accepts a checkpoint that lacks exactly these when it resumes.
            self._keys_to_ignore_on_save = {name for name in self.state_dict() if is_language_key(name)}
        self.suppress_placeholder()

    def suppress_placeholder(self) -> None:
        """Never generate a placeholder: it would ask for a visual token that does not exist."""
        settings = self.generation_config
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), self.config.image_token_id})

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's head."""
        return self.lm_head

    def get_image_features(self, *args: Any, **kwargs: Any) -> FusedVLMImageFeatures:
        """See `FusedVLMModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def read_uint8_views(self, image_processor: Any) -> None:
        """See `FusedVLMFusionModel.read_uint8_views`."""
        self.model.read_uint8_views(image_processor)

    def get_image_features_every_count(
        self, counts: Sequence[int], **inputs: Unpack[FusedVLMKwargs]
    ) -> dict[int, FusedVLMImageFeatures]:
        """See `FusedVLMModel.get_image_features_every_count`."""
        return self.model.get_image_features_every_count(counts, **inputs)

    def _expand_inputs_for_generation(  # type: ignore[override]  # there it is no method of a model
        self, expand_size: int = 1, **kwargs: Any
    ) -> tuple[torch.Tensor | None, dict]:
        """As the base class. Beams and samples repeat a conversation's visual tokens with its prompt, here alone."""
        outputs = kwargs.pop("mm_encoder_outputs", None)
        base: Any = super()
        input_ids, model_kwargs = base._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if outputs is not None:
            image = outputs.get("image")
            repeated = image if image is None or expand_size == 1 else repeat_features(image, expand_size)
            model_kwargs["mm_encoder_outputs"] = {**outputs, "image": repeated}
        return input_ids, model_kwargs

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        """As the base class; the placeholder is suppressed without a search through the vocabulary."""
        base: Any = super()
        processors = base._get_logits_processor(generation_config, *args, **kwargs)
        return SuppressingLogitsProcessorList.of(processors, in_place=not generation_config.output_logits)

    # `inputs_embeds` is named because `generate` looks for it in this signature.
    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs: Any,
    ) -> dict:
        """As the base class, but an assistant model's first step keeps its images; transformers drops them there."""
        base: Any = super()
        inputs = base.prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        if mm_encoder_outputs and past_key_values is not None and past_key_values.get_seq_length() == 0:
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return inputs

    @can_return_tuple
    def forward(  # type: ignore[misc]
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
        answer_logits_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusedVLMCausalLMOutputWithPast:
        """Prompt (B, L) and images to logits (B, L, vocabulary), with a loss when `labels` (B, L) are given.

        Labels are aligned with `input_ids` (the shift happens inside), -100 where nothing is to be learned. Image
        arguments as in `FusedVLMFusionModel.fuse`. With `answer_logits_only` logits are
        (labeled tokens, vocabulary), row after row: all that a loss needs, and mostly much smaller.
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
        if answer_logits_only:
            if labels is None:
                raise ValueError("answer_logits_only=True needs labels: they say which tokens are the answers.")
            hidden_states, kwargs["shift_labels"] = labeled_states(hidden_states, labels)
            logits_to_keep = 0
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(hidden_states[..., keep, :]), self.config.text_config)
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


# `generate` asks for it at every token; taken apart once.
FusedVLMForConditionalGeneration.forward.__signature__ = inspect.signature(FusedVLMForConditionalGeneration.forward)
FusedVLMModel.register_for_auto_class("AutoModel")
FusedVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "FusedVLMEncoder",
    "FusedVLMForConditionalGeneration",
    "FusedVLMForContrastiveLearning",
    "FusedVLMFusionModel",
    "FusedVLMModel",
    "FusedVLMPreTrainedModel",
]

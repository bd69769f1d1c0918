"""Stage 1: images with questions against answers, before any language model is involved.

Shape legend
    B   conversations      L   prompt length        H   LLM width
    V   views              T   tokens per view      C   width of vision tower and fusion decoder
    I   images             G   segments: one question asked about one image
    m_g visual tokens of segment g (m for an image's first question, m' for later ones)
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .configuration_fusedvlm import FusedVLMConfig
from .modeling_fusedvlm_base import FusedVLMPreTrainedModel
from .modeling_fusedvlm_fusion import FusedVLMFusionModel, split_image_inputs
from .modeling_fusedvlm_losses import contrastive_loss, identity_loss, zero_large_entries


@dataclass
class FusedVLMContrastiveOutput(ModelOutput):
    """Stage 1.

    Args:
        loss: contrastive_loss + identity_loss, with `return_loss=True`.
        contrastive_loss, identity_loss: its two parts.
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


class FusedVLMForContrastiveLearning(FusedVLMPreTrainedModel):
    """Stage 1: the eos state of question k against the answer tower's eos state of answer k.

    As published, but for `zero_large_answer_entries`: fusedvlm's docs/reference.md, "Stage 1".
    """

    main_input_name = "pixel_values"

    def __init__(self, config: FusedVLMConfig) -> None:
        super().__init__(config)
        if config.answer_config is None:
            raise ValueError("Stage 1 reads answers with a text tower: set answer_config (a CLIPTextConfig).")
        if not config.connector_class.has_contrastive_stage:
            raise ValueError(
                f"The {config.connector} connector has no stage 1, which pairs the last query's state with an answer; "
                "train it from stage 2 on."
            )
        self.model = FusedVLMFusionModel(config)
        self.answer_tower = CLIPTextModel._from_config(config.answer_config)
        self.answer_projection = nn.Linear(config.answer_config.hidden_size, config.projection_dim, bias=False)
        self.image_projection = nn.Linear(config.fuser_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        merged: bool = False,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """As the base class; the temperature, which is a row of one number while it is sharded, is a scalar again."""
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        state_dict["logit_scale"] = state_dict["logit_scale"].reshape(())
        return super().save_pretrained(save_directory, merged=merged, state_dict=state_dict, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Embeddings of questions and queries; there is no LLM here."""
        return self.model.fuser.embed_tokens

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
        answer_input_ids: torch.Tensor | None = None,
        answer_attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> FusedVLMContrastiveOutput:
        """Images as in `FusedVLMImageInputs`; one answer per segment, in segment order.

        Without images there are no pairs: the outputs have no rows and the loss is zero, but every parameter still gets
        a gradient (of zeros), so that a data-parallel rank without images does not keep the others waiting.

        Raises:
            ValueError: when the numbers of questions and answers differ.
        """
        images, _ = split_image_inputs(kwargs)
        if pixel_values is None and images.get("view_features") is None:
            return self._without_pairs(return_loss)
        fused, _ = self.model.fuse(**{**images, "pixel_values": pixel_values})
        num_answers = 0 if answer_input_ids is None else len(answer_input_ids)
        if answer_input_ids is None or answer_attention_mask is None or len(fused.segment_states) != num_answers:
            raise ValueError(f"{len(fused.segment_states)} questions but {num_answers} answers (ids with their mask).")
        eos_states = torch.stack([states[-1] for states in fused.segment_states])
        image_embeds = nn.functional.normalize(self.image_projection(eos_states), dim=-1)
        answer_embeds = self.get_answer_embeds(answer_input_ids, answer_attention_mask)
        return self._output(image_embeds, answer_embeds, torch.cat(fused.segment_states), return_loss)

    def _without_pairs(self, return_loss: bool | None) -> FusedVLMContrastiveOutput:
        """Outputs without rows that depend on every parameter, from one blank view and one empty answer."""
        size = self.config.vision_config.image_size
        view = torch.zeros(1, 3, size, size, device=self.device)
        question = self.model.connector.dummy_question(self.device)
        fused, _ = self.model.fuse(pixel_values=view, num_visual_tokens=1, **question)
        states = fused.segment_states[0]
        answer = torch.full((1, 1), self.config.answer_config.eos_token_id, device=self.device)
        image_embeds, answer_embeds = self.image_projection(states), self.get_answer_embeds(answer, answer * 0 + 1)
        return self._output(image_embeds[:0], answer_embeds[:0], states[:0], return_loss)

    def _output(
        self,
        image_embeds: torch.Tensor,
        answer_embeds: torch.Tensor,
        query_states: torch.Tensor,
        return_loss: bool | None,
    ) -> FusedVLMContrastiveOutput:
        scale = self.logit_scale.exp().squeeze()  # one row of one number where the model is sharded
        output = FusedVLMContrastiveOutput(
            logits_per_image=image_embeds @ answer_embeds.T,
            logit_scale=scale,
            image_embeds=image_embeds,
            answer_embeds=answer_embeds,
            query_states=query_states,
        )
        if return_loss:
            output.contrastive_loss = contrastive_loss(image_embeds, answer_embeds, scale)
            output.identity_loss = identity_loss(query_states)
            output.loss = output.contrastive_loss + output.identity_loss
        return output

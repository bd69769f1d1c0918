"""Stage 1: the eos state of a question about an image against its answer, and query states that stay apart."""

import os
from typing import TYPE_CHECKING, Any

import torch

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_losses import contrastive_loss, identity_loss

from .arguments import ContrastiveArguments
from .base import FusedVLMTrainer
from .collators import ConversationCollator
from .distributed import gather_rows

if TYPE_CHECKING:
    from fusedvlm.modeling_fusedvlm import FusedVLMForContrastiveLearning
    from fusedvlm.processing import FusedVLMProcessor


class ContrastiveTrainer(FusedVLMTrainer):
    """Train `FusedVLMForContrastiveLearning`: symmetric cross-entropy over eos pairs + identity loss.

    Both parts are those of the global batch: over the pairs, and over the query states, of all ranks. Ranks may differ
    in their numbers of pairs, or have none. Under gradient accumulation each micro-batch is a batch of its own, and
    their losses are averaged. Logged: both parts, and the share of questions whose own answer is the nearest of the
    global batch (`retrieval_at_1`).
    """

    stage = "contrastive"
    model_class = "FusedVLMForContrastiveLearning"
    arguments_class = ContrastiveArguments
    args: ContrastiveArguments

    def __init__(
        self, model: "FusedVLMForContrastiveLearning", args: ContrastiveArguments, *others: Any, **kwargs: Any
    ) -> None:
        if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
            # Neither can hold a scalar; saving makes it one again.
            model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))
        super().__init__(model, args, *others, **kwargs)
        # The loss is a mean over pairs of a batch, not a sum over tokens: Trainer must average micro-batches itself.
        self.model_accepts_loss_kwargs = False

    def default_collator(
        self, processor: "FusedVLMProcessor", args: Any, model: Any, **kwargs: Any
    ) -> ConversationCollator:
        """Collator that also tokenizes the answers."""
        length = model.config.answer_config.max_position_embeddings
        return super().default_collator(processor, args, model, with_answers=True, max_answer_length=length, **kwargs)

    def stage_loss(self, model: Any, inputs: dict, return_outputs: bool, num_items_in_batch: Any) -> Any:
        """Contrastive part + `identity_loss_weight` x identity part (docs/reference.md, "Stage 1")."""
        texts = ("input_ids", "attention_mask", "labels")
        outputs = model(**{name: value for name, value in inputs.items() if name not in texts})
        # In evaluation ranks may see different numbers of batches, so each looks at its own.
        images, answers = outputs.image_embeds, outputs.answer_embeds
        if self.model.training:
            images, answers = gather_rows(images), gather_rows(answers)
        contrastive = contrastive_loss(images, answers, outputs.logit_scale)
        identity = identity_loss(outputs.query_states, across_processes=self.model.training)
        loss = contrastive + self.args.identity_loss_weight * identity
        self.record(contrastive_loss=contrastive, identity_loss=identity)
        if len(images):
            self.record(len(images), retrieval_at_1=retrieval_at_1(images, answers))
        if self.model.training:
            self.throughput.count(inputs, answers=inputs["answer_attention_mask"])
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def retrieval_at_1(image_embeds: torch.Tensor, answer_embeds: torch.Tensor) -> torch.Tensor:
    """Share of the (G, D) questions whose own answer, the k-th for the k-th, has the largest cosine."""
    nearest = (image_embeds @ answer_embeds.T).argmax(-1)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()

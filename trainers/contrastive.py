"""Stage 1: the eos state of a question about an image against its answer, and query states that stay apart."""

import torch
from open_clip.loss import ClipLoss

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_losses import identity_loss

from .base import FusedVLMTrainer
from .collators import ConversationCollator


class ContrastiveTrainer(FusedVLMTrainer):
    """Train `FusedVLMForContrastiveLearning`: symmetric cross-entropy over eos pairs + identity loss.

    The contrastive part is open_clip's loss, over the pairs of all ranks. Logged: both parts of the loss and the share
    of questions whose own answer is the nearest of the batch (`retrieval_at_1`).
    """

    stage = "contrastive"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The loss is a mean over pairs of a batch, not a sum over tokens: Trainer must average micro-batches itself.
        self.model_accepts_loss_kwargs = False
        self.clip_loss = ClipLoss(
            local_loss=self.args.local_loss,
            gather_with_grad=self.args.gather_with_grad,
            cache_labels=False,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def default_collator(self, processor, args, model) -> ConversationCollator:
        """Collator that also tokenises the answers."""
        return ConversationCollator(
            processor, with_answers=True, max_answer_length=model.config.answer_config.max_position_embeddings
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Contrastive part + `identity_loss_weight` x identity part (reference section 5)."""
        inputs = {
            name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "labels")
        }
        outputs = model(**inputs)
        contrastive = self.clip_loss(outputs.image_embeds, outputs.answer_embeds, outputs.logit_scale)
        identity = identity_loss(outputs.query_states)
        loss = contrastive + self.args.identity_loss_weight * identity
        self.require_finite(loss)
        with torch.no_grad():
            nearest = outputs.logits_per_image.argmax(-1)
            own = torch.arange(len(nearest), device=nearest.device)
            self.record(
                contrastive_loss=contrastive,
                identity_loss=identity,
                retrieval_at_1=(nearest == own).float().mean(),
            )
        return (loss, outputs) if return_outputs else loss

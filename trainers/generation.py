"""Stages 2 and 3: learn to answer through a frozen LLM, with a fixed or an elastic number of visual tokens."""

from .base import FusedVLMTrainer
from .collators import ConversationCollator
from .elastic import draw_num_visual_tokens, shrink_visual_tokens


class GenerationTrainer(FusedVLMTrainer):
    """Train `FusedVLMForConditionalGeneration` on answer and eos tokens; vision, fusion and projection learn.

    With `elastic_num_visual_tokens` each step draws its m. Logged beside the loss: `loss_m_<m>`, the loss at each m
    drawn since the last log.
    """

    stage = "generation"

    def default_collator(self, processor, args, model) -> ConversationCollator:
        """Collator at the largest m that can be drawn."""
        choices = args.elastic_num_visual_tokens
        if choices is not None:
            model.config.check_num_visual_tokens(max(choices), "elastic_num_visual_tokens")
        return ConversationCollator(processor, num_visual_tokens=None if choices is None else max(choices))

    def step_num_visual_tokens(self) -> int | None:
        """The m of the current step; None when it is fixed."""
        choices, probabilities = self.args.elastic_num_visual_tokens, self.args.elastic_probabilities
        if choices is None:
            return None
        step = self.state.global_step
        if step < self.args.elastic_warmup_fraction * self.state.max_steps:
            large = [index for index, m in enumerate(choices) if m >= self.args.elastic_warmup_minimum]
            choices = [choices[index] for index in large]
            if probabilities is not None:
                kept = [probabilities[index] for index in large]
                probabilities = [value / sum(kept) for value in kept]
        return draw_num_visual_tokens(choices, step, self.args.elastic_seed, probabilities)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy on labelled tokens, averaged over the labelled tokens of the global batch."""
        m = self.step_num_visual_tokens() if model.training else None
        if m is not None:
            tokenizer = self.processing_class.tokenizer
            image_token_id = self.processing_class.image_token_id
            inputs = shrink_visual_tokens(inputs, m, image_token_id, tokenizer.pad_token_id)
        # No key-value cache while training; in the call, so that the saved config keeps it for generation.
        result = super().compute_loss(
            model, {**inputs, "use_cache": False}, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss = result[0] if return_outputs else result
        self.require_finite(loss)
        if m is not None:
            # Micro-batches of one step sum to the step's loss, so the logged value is per micro-batch of the step.
            self.record(**{f"loss_m_{m}": loss * self.current_gradient_accumulation_steps})
        return result

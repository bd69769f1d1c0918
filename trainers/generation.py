"""Stages 2 and 3: learn to answer through a frozen LLM, with a fixed or an elastic number of visual tokens."""

import torch
from torch.nn import functional as F

from .base import FusedVLMTrainer
from .collators import IGNORED, ConversationCollator
from .elastic import draw_num_visual_tokens, draw_per_sample, shrink_visual_tokens


class GenerationTrainer(FusedVLMTrainer):
    """Train `FusedVLMForConditionalGeneration` on answer and eos tokens; vision, fusion and projection learn.

    The loss is summed over the labeled tokens of the global batch, whatever the split into ranks and micro-batches.
    With `elastic_num_visual_tokens` each step, or each sample, draws its m; logged beside the loss is `loss_m_<m>`, the
    mean per token at each m drawn since the last log, and evaluation goes through every m.
    """

    stage = "generation"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._micro_batch = (-1, 0)  # (step, how many of its micro-batches this rank has begun)

    def default_collator(self, processor, args, model) -> ConversationCollator:
        """Collator at the largest m that can be drawn."""
        choices = args.elastic_num_visual_tokens
        if choices is not None:
            for m in choices:
                model.config.check_num_visual_tokens(m, "elastic_num_visual_tokens")
        largest = None if choices is None else max(choices)
        return super().default_collator(processor, args, model, num_visual_tokens=largest)

    def draw(self, num_samples: int) -> int | torch.Tensor | None:
        """The m of the current step, or (num_samples,) of its samples; None when it is fixed."""
        choices, probabilities = self.args.elastic_num_visual_tokens, self.args.elastic_probabilities
        if choices is None:
            return None
        step, seed = self.state.global_step, self.args.elastic_seed
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        if step < self.args.elastic_warmup_fraction * self.state.max_steps:
            large = [index for index, m in enumerate(choices) if m >= self.args.elastic_warmup_minimum]
            choices = [choices[index] for index in large]
            if probabilities is not None:
                kept = [probabilities[index] for index in large]
                probabilities = [value / sum(kept) for value in kept]
        if not self.args.elastic_per_sample:
            return draw_num_visual_tokens(choices, step, seed, probabilities)
        rank, micro_batch = self.args.process_index, self._micro_batch[1]
        return draw_per_sample(choices, num_samples, step, seed, rank, micro_batch, probabilities)

    def stage_loss(self, model, inputs: dict, return_outputs: bool, num_items_in_batch):
        """Cross-entropy on labeled tokens, averaged over the labeled tokens of the global batch."""
        # No key-value cache while training; in the call, so that the saved config keeps it for generation.
        inputs["use_cache"] = False
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # a step may have no labeled token at all
        inputs["answer_logits_only"] = self.label_smoother is None
        drawn = self.draw(len(inputs["input_ids"]))
        shrunk = self._shrink(inputs, drawn)
        self.throughput.count(shrunk)
        loss, outputs = super(FusedVLMTrainer, self).compute_loss(
            model, shrunk, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if drawn is not None and self.label_smoother is None:
            self._record_per_m(outputs["logits"].detach(), shrunk["labels"], drawn)
            # Decided by the draw alone: sharded ranks must agree on whether there is another forward pass.
            is_smaller = isinstance(drawn, torch.Tensor) or drawn < max(self.args.elastic_num_visual_tokens)
            if self.args.distillation_weight and is_smaller:
                loss = loss + self._distillation(model, inputs, outputs["logits"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _shrink(self, inputs: dict, drawn: int | torch.Tensor | None) -> dict:
        if drawn is None:
            return inputs
        pad_token_id = self.processing_class.tokenizer.pad_token_id
        processor = self.processing_class
        return shrink_visual_tokens(inputs, drawn, processor.image_token_id, pad_token_id, processor.counts.per_view)

    def _evaluation_loss(self, model, inputs: dict, return_outputs: bool):
        """Mean per labeled token of this batch at the collator's m; at every elastic m for the metrics."""
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        for m in self.args.elastic_num_visual_tokens or ():
            shrunk = self._shrink(inputs, m)
            self.record(tokens, **{f"loss_m_{m}": super(FusedVLMTrainer, self).compute_loss(model, shrunk)})
        return super(FusedVLMTrainer, self).compute_loss(model, inputs, return_outputs=return_outputs)

    @torch.no_grad()
    def _record_per_m(self, logits: torch.Tensor, labels: torch.Tensor, drawn: int | torch.Tensor) -> None:
        """Mean loss per labeled token at each m; logits (labeled tokens, vocabulary)."""
        is_labeled = labels[:, 1:] != IGNORED
        losses = F.cross_entropy(logits.float(), labels[:, 1:][is_labeled], reduction="none")
        per_sample = drawn if isinstance(drawn, torch.Tensor) else torch.tensor([drawn]).expand(len(labels))
        m_of_token = per_sample.to(labels.device)[:, None].expand_as(is_labeled)[is_labeled]
        for m in per_sample.unique().tolist():
            chosen = m_of_token == m
            if chosen.any():
                self.record(chosen.sum(), **{f"loss_m_{m}": losses[chosen].mean()})

    def _distillation(self, model, inputs: dict, logits: torch.Tensor, num_items) -> torch.Tensor:
        """Weighted divergence of the answers at the drawn m from those at the largest, on the scale of the loss."""
        with torch.no_grad():
            teacher = model(**inputs)["logits"]
        divergence = distillation_loss(logits, teacher, self.args.distillation_temperature)
        divergence = divergence / (max(len(logits), 1) if num_items is None else num_items)
        self.record(distillation_loss=divergence * self.current_gradient_accumulation_steps)
        if num_items is not None and self.args.average_tokens_across_devices:
            divergence = divergence * self.accelerator.num_processes  # data parallelism takes the mean over ranks
        return self.args.distillation_weight * divergence


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sum over tokens of T^2 KL(teacher || student), both softened by the temperature T.

    Args:
        student, teacher: (n, vocabulary) logits of the same tokens; no gradient flows to the teacher.
    """
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)

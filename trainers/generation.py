"""Stages 2 and 3: learn to answer through a frozen LLM, with a fixed or an elastic number of visual tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

from fusedvlm.data.mixing.grouped import source_of_micro_batch

from .arguments import GenerationArguments
from .base import FusedVLMTrainer
from .collators import IGNORED, ConversationCollator
from .elastic import (
    draw_from,
    draw_num_visual_tokens,
    draw_per_sample,
    join_versions,
    octave,
    shares_from,
    shrink_visual_tokens,
)

FURTHER_DRAW = 1_000_005  # and those of further m of a step
FOLLOWUP_DRAW = 1_000_003  # tells the draw of m' from those of m, whose keys are (seed, step, number of the source)
MANY_COUNTS = 10  # with more m than this, logs and evaluation name doublings


class GenerationTrainer(FusedVLMTrainer):
    """Train `FusedVLMForConditionalGeneration` on answer and eos tokens; vision, fusion and projection learn.

    The loss is summed over the labeled tokens (or, with `loss_per="answer"`, the answers) of the global batch, whatever
    the split into ranks and micro-batches. With `elastic_num_visual_tokens` or `elastic_range` each step, or each
    sample, draws its m; logged beside the loss is `loss_m_<m>`, the mean per token at each m drawn since the last log
    (of a range, per doubling: `loss_m_8_to_15`), and evaluation goes through every m (of a range, through its
    doublings). With `batch_groups`, `loss_<source>` is logged too.
    """

    stage = "generation"
    model_class = "FusedVLMForConditionalGeneration"
    arguments_class = GenerationArguments
    args: GenerationArguments
    _micro_batch = (-1, 0)  # (step, how many of its micro-batches this rank has begun)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; configuration and processor say from then on whether every m of a range is trained."""
        self._state_trained_counts()
        return super().train(*args, **kwargs)

    def _state_trained_counts(self) -> None:
        drawn = self.args.elastic_counts()
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        config, processor = model.config, self.processing_class
        if drawn is None or not (drawn[0] <= min(config.trained_num_visual_tokens) <= drawn[-1]):
            return
        every = {m for m in config.connector_class.counts(config) if drawn[0] <= m <= config.max_num_visual_tokens}
        if len(drawn) == 1 or not every <= {*drawn}:
            return  # the listed counts, as they are
        config.trained_num_visual_tokens = sorted({drawn[0], *config.trained_num_visual_tokens})
        config.trained_num_visual_tokens_is_range = True
        if hasattr(processor, "trained_num_visual_tokens"):
            processor.trained_num_visual_tokens = list(config.trained_num_visual_tokens)
            processor.trained_num_visual_tokens_is_range = True

    def default_collator(self, processor: Any, args: Any, model: Any, **kwargs: Any) -> ConversationCollator:
        """Collator at the largest m that can be drawn."""
        choices = args.elastic_counts()
        name = "elastic_num_visual_tokens" if args.elastic_range is None else "elastic_range"
        for m in choices or ():
            model.config.check_num_visual_tokens(m, name)
        counts: dict[str, int] = {} if choices is None else {"num_visual_tokens": max(choices)}
        if args.elastic_followup is not None:
            counts["num_followup_visual_tokens"] = max(args.elastic_followup)
        return super().default_collator(processor, args, model, **counts, **kwargs)

    def draw(self, num_samples: int) -> int | torch.Tensor | None:
        """The m of the current micro-batch, or (num_samples,) of its samples; None when it is fixed."""
        args: Any = self.args
        step = self.state.global_step
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        source = self.source_of_batch()
        shares = args.elastic_shares(source)
        if shares is None:
            return None
        is_warming_up = step < args.elastic_warmup_fraction * self.state.max_steps
        if is_warming_up and source in (args.elastic_warmup_sources or [source]):
            shares = shares_from(shares, args.elastic_warmup_minimum) or {max(shares): 1.0}
        choices = list(shares)
        probabilities: list[float] | None = list(shares.values())
        if len({*shares.values()}) == 1 and args.elastic_range is None and args.elastic_probabilities is None:
            probabilities = None  # numpy draws uniform counts differently, and runs under way go on as they began
        if args.elastic_per_sample or source in (args.elastic_per_sample_sources or ()):
            rank, micro_batch = args.process_index, self._micro_batch[1]
            return draw_per_sample(choices, num_samples, step, args.elastic_seed, rank, micro_batch, probabilities)
        if source in (args.elastic_by_source or {}):
            return draw_from(shares, args.elastic_seed, step, 1 + list(args.batch_groups).index(source))
        return draw_num_visual_tokens(choices, step, args.elastic_seed, probabilities)

    def draw_followup(self) -> int | None:
        """The m' of the current step; None when it is the collator's."""
        choices = self.args.elastic_followup
        if choices is None:
            return None
        return draw_from(
            dict.fromkeys(choices, 1 / len({*choices})), self.args.elastic_seed, self._micro_batch[0], FOLLOWUP_DRAW
        )

    def source_of_batch(self) -> str | None:
        """The source of the current micro-batch, where each is of one."""
        if self.args.batch_groups is None:
            return None
        groups: Any = self.args.batch_groups  # a mapping, once `TrainingArguments` has read it
        sources = source_of_micro_batch(groups, self.args.per_device_train_batch_size)
        return sources[max(self._micro_batch[1], 0) % len(sources)]

    def stage_loss(
        self, model: Any, inputs: dict, return_outputs: bool, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Cross-entropy on labeled tokens, averaged over the labeled tokens or the answers of the global batch."""
        # No key-value cache while training; in the call, so that the saved config keeps it for generation.
        inputs["use_cache"] = False
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # a step may have no labeled token at all
        inputs["answer_logits_only"] = self.label_smoother is None
        drawn = self.draw(len(inputs["input_ids"]))
        if self.args.elastic_samples_per_step > 1 and isinstance(drawn, int) and "num_visual_tokens" in inputs:
            return self._loss_of_several(model, inputs, drawn, return_outputs, num_items_in_batch)
        shrunk = self.shrink(inputs, drawn, self.draw_followup())
        self.throughput.count(shrunk)
        loss, outputs = self._loss(model, shrunk, num_items_in_batch)
        if self.label_smoother is None:
            self._record_parts(outputs["logits"].detach(), shrunk["labels"], drawn)
        # Decided by the draw alone: sharded ranks must agree on whether there is another forward pass.
        is_smaller = isinstance(drawn, torch.Tensor) or (
            drawn is not None and drawn < max(self.args.elastic_counts() or ())
        )
        if self.args.distillation_weight and is_smaller and self.label_smoother is None:
            loss = loss + self._distillation(model, inputs, outputs["logits"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _loss_of_several(
        self, model: Any, inputs: dict, first: int, return_outputs: bool, num_items: torch.Tensor | int | None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Mean of the losses at several m of the same samples, from one pass over their views and questions."""
        drawn, followup = [first, *self.draw_more()], self.draw_followup()
        versions = [self.shrink(inputs, m, followup) for m in drawn]
        joined = join_versions(versions, self.processing_class.tokenizer.pad_token_id)
        self.throughput.count({**joined, "num_visual_tokens": joined["num_visual_tokens"].amax(0)})
        loss, outputs = self._loss(model, joined, num_items)
        rows = torch.tensor(drawn).repeat_interleave(len(inputs["input_ids"]))
        self._record_parts(outputs["logits"].detach(), joined["labels"], rows)
        if num_items is not None:
            loss = loss / len(drawn)  # labels are counted once, and are learned at every m
        return (loss, outputs) if return_outputs else loss

    def draw_more(self) -> list[int]:
        """The other m of the current step, with `elastic_samples_per_step`; the same on every rank."""
        args: Any = self.args
        step, source = self._micro_batch[0], self.source_of_batch()
        shares = args.elastic_shares(source)
        if shares is None:
            return []
        is_warming_up = step < args.elastic_warmup_fraction * self.state.max_steps
        if is_warming_up and source in (args.elastic_warmup_sources or [source]):
            shares = shares_from(shares, args.elastic_warmup_minimum) or {max(shares): 1.0}
        keys = range(1, args.elastic_samples_per_step)
        return [draw_from(shares, args.elastic_seed, step, FURTHER_DRAW, key) for key in keys]

    def shrink(self, inputs: dict, drawn: int | torch.Tensor | None, followup: int | None = None) -> dict:
        """The batch at the m, and the m', that were drawn."""
        if drawn is None and followup is None:
            return inputs
        processor = self.processing_class
        if drawn is None and "num_visual_tokens" in inputs:
            drawn = int(inputs["num_visual_tokens"].max())
        return shrink_visual_tokens(
            inputs,
            0 if drawn is None else drawn,
            processor.image_token_id,
            processor.tokenizer.pad_token_id,
            processor.counts.per_view,
            followup,
        )

    def _loss(self, model: Any, inputs: dict, num_items: torch.Tensor | int | None) -> tuple[torch.Tensor, Any]:
        """Loss of a micro-batch on the scale of `Trainer.compute_loss`, and the model's outputs."""
        if self.args.loss_per == "token":
            result: Any = super(FusedVLMTrainer, self).compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items
            )
            return result
        outputs = model(**{**inputs, "answer_logits_only": True})
        losses, _ = answer_losses(outputs["logits"], inputs["labels"])
        if num_items is None:
            return losses.sum() / max(len(losses), 1), outputs
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() / num_items * ranks, outputs  # data parallelism takes the mean over ranks

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """As `Trainer`'s; with `loss_per="answer"` it counts answers."""
        if self.args.loss_per == "answer":
            batch_samples = [{"labels": first_tokens(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _evaluation_loss(
        self, model: Any, inputs: dict, return_outputs: bool
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Mean per labeled token, or answer, of this batch at the collator's m; at elastic m for the metrics."""
        labels = inputs["labels"] if self.args.loss_per == "token" else first_tokens(inputs["labels"])
        for m in doublings(self.args.elastic_counts() or ()):
            shrunk = self.shrink(inputs, m)
            self.record((labels[:, 1:] != IGNORED).sum(), **{f"loss_m_{m}": self._loss(model, shrunk, None)[0]})
        loss, outputs = self._loss(model, inputs, None)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record_parts(self, logits: torch.Tensor, labels: torch.Tensor, drawn: int | torch.Tensor | None) -> None:
        """Mean loss per labeled token at each m, and of the source; logits (labeled tokens, vocabulary)."""
        source = self.source_of_batch()
        if drawn is None and source is None:
            return
        is_labeled = labels[:, 1:] != IGNORED
        losses = F.cross_entropy(logits.float(), labels[:, 1:][is_labeled], reduction="none")
        if source is not None and len(losses):
            self.record(len(losses), **{f"loss_{source}": losses.mean()})
        if drawn is None:
            return
        per_sample = drawn if isinstance(drawn, torch.Tensor) else torch.tensor([drawn]).expand(len(labels))
        m_of_token = per_sample.to(labels.device)[:, None].expand_as(is_labeled)[is_labeled]
        is_range = len(self.args.elastic_counts() or ()) > MANY_COUNTS
        for m in per_sample.unique().tolist():
            chosen = m_of_token == m
            if chosen.any():
                self.record(chosen.sum(), **{f"loss_m_{octave(m) if is_range else m}": losses[chosen].mean()})

    def _distillation(
        self, model: Any, inputs: dict, logits: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Weighted divergence of the answers at the drawn m from those at the largest, on the scale of the loss."""
        with torch.no_grad():
            teacher = model(**inputs)["logits"]
        divergence = distillation_loss(logits, teacher, self.args.distillation_temperature)
        divergence = divergence / (max(len(logits), 1) if num_items is None else num_items)
        self.record(distillation_loss=divergence * self.current_gradient_accumulation_steps)
        if num_items is not None and self.args.average_tokens_across_devices:
            divergence = divergence * self.accelerator.num_processes  # data parallelism takes the mean over ranks
        return self.args.distillation_weight * divergence


def first_tokens(labels: torch.Tensor) -> torch.Tensor:
    """(B, L) labels of which only the first of each answer is left."""
    is_labeled = labels != IGNORED
    continues = F.pad(is_labeled[:, :-1], (1, 0), value=False)
    return torch.where(is_labeled & ~continues, labels, IGNORED)


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each answer, in the mean over its tokens.

    Args:
        logits: (labeled tokens, vocabulary), row by row, as the model returns them with `answer_logits_only`.
        labels: (B, L); an answer is a run of labeled tokens.

    Returns:
        (answers,) losses, and (labeled tokens,) the number of the answer that each token belongs to.
    """
    following = labels[:, 1:]
    is_labeled = following != IGNORED
    answer = (first_tokens(labels)[:, 1:] != IGNORED).flatten().long().cumsum(0)[is_labeled.flatten()] - 1
    losses = F.cross_entropy(logits.float(), following[is_labeled], reduction="none")
    lengths = answer.bincount()
    return losses.new_zeros(len(lengths)).index_add(0, answer, losses) / lengths, answer


def doublings(counts: Sequence[int]) -> list[int]:
    """The counts to evaluate at: all of a few, the powers of two and both ends of many."""
    if len(counts) <= MANY_COUNTS:
        return list(counts)
    return [m for m in counts if m & (m - 1) == 0 or m in (counts[0], counts[-1])]


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sum over tokens of T^2 KL(teacher || student), both softened by the temperature T.

    Args:
        student, teacher: (n, vocabulary) logits of the same tokens; no gradient flows to the teacher.
    """
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)

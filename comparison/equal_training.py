"""Training one set of weights until its counted FLOPs are spent: the same rule for every entrant.

Look-up first (one-word questions only), then one-word and dense questions in micro-batches of their own; learning rate
and phase follow the share of FLOPs spent, so that a cheap connector gets more steps, not another schedule.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import set_seed

from fusedvlm.console import progress

from .conversations import IGNORED, Batches, Stream
from .flop_account import FlopAccount
from .plan import Plan


@dataclass(frozen=True)
class TrainingRecord:
    """What a training spent and reached."""

    tflops: float
    steps: int
    conversations: int
    seconds: float
    trained_parameters: int
    last_loss: float

    def record(self) -> dict:
        """JSON-ready."""
        return asdict(self)


def draw_count(counts: Sequence[int], seed: int, step: int, group: int, large: bool) -> int:
    """The m of a micro-batch: any of an entrant's; dense questions draw the largest half of the time.

    The draw depends on (seed, step, group) alone.
    """
    generator = np.random.default_rng([seed, 7, step, group])
    if large and generator.random() < 0.5:
        return max(counts)
    return int(generator.choice(np.asarray(counts)))


def train_equally(
    model: Any,
    batches: Batches,
    samples: list,
    plan: Plan,
    counts: Sequence[int],
    seed: int,
    description: str,
) -> TrainingRecord:
    """Train the connector of a model in place; tower and LLM stay frozen.

    Args:
        model: `FusedVLMForConditionalGeneration`, freshly initialized.
        batches: over the cached view tokens of this model.
        samples: training images.
        counts: the m these weights are for.
        seed: of the order of conversations and of the drawn m.

    Raises:
        ValueError: when the loss is not finite.
    """
    set_seed(seed + 3)
    freeze(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    one_word, dense = Stream(samples, "one_word", seed), Stream(samples, "dense", seed)
    account, budget, step, losses = FlopAccount(), plan.training_tflops * 1e12, 0, []
    started = time.perf_counter()
    model.train()
    with contextlib.closing(progress(total=100, description=description, leave=False)) as bar:
        while account.spent < budget:
            share = account.spent / budget
            rate = max(0.02, min(1.0, (step + 1) / 50, (1 - share) / 0.4))
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * rate
            optimizer.zero_grad(set_to_none=True)
            looking_up = share < plan.look_up_share
            mixed = [(one_word, plan.one_word_rows), (dense, plan.dense_rows)]
            groups = [(one_word, plan.batch_size)] if looking_up else mixed
            choices = [m for m in counts if m <= plan.look_up_largest] if looking_up else counts
            step_losses: list[float] = []
            for number, (stream, rows) in enumerate(groups):
                m = draw_count(choices or counts, seed, step, number, large=stream is dense)
                batch = batches(stream.take(rows), m)
                shape = (*batch["input_ids"].shape, m, int((batch["labels"] != IGNORED).sum()))
                step_losses.append(account.run(shape, partial(backward, model, batch)))
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            step += 1
            losses.append(float(sum(step_losses)) / len(step_losses))
            if not np.isfinite(losses[-1]):
                raise ValueError(f"{description}: the loss is {losses[-1]} at step {step}; lower the learning rate.")
            bar.update(int(100 * min(1.0, account.spent / budget)) - bar.n)
            bar.set_postfix(step=step, loss=f"{losses[-1]:.3f}")
    return TrainingRecord(
        tflops=account.spent / 1e12,
        steps=step,
        conversations=one_word.next + dense.next,
        seconds=time.perf_counter() - started,
        trained_parameters=sum(parameter.numel() for parameter in learned),
        last_loss=float(np.mean(losses[-20:])),
    )


def freeze(model: Any) -> None:
    """Only the connector learns: neither the tower nor anything of the LLM."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.vision_tower.", "model.language_model.", "lm_head.")))


def backward(model: Any, batch: dict) -> float:
    """Loss and gradients of one micro-batch: the mean over its answers of each answer's mean per token."""
    labels = batch.pop("labels")
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    is_labeled = following != IGNORED
    logits = model(**batch, labels=labels, answer_logits_only=True, use_cache=False).logits
    losses = F.cross_entropy(logits, following[is_labeled], reduction="none")
    row = is_labeled.nonzero()[:, 0]
    loss = (losses / is_labeled.sum(1)[row]).sum() / len(labels)
    loss.backward()
    return float(loss.detach())

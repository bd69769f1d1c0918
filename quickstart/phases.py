"""Stage 2: a look-up phase that is ended by its loss, then one-word and dense questions side by side at every m."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from fusedvlm.console import progress, say
from fusedvlm.trainers import ConversationCollator, GenerationArguments, GenerationTrainer

from .kinds import Conversations
from .settings import Settings
from .stages import Allowance, BarCallback, Clock, common_arguments

# Seconds kept back for evaluation, saving, loading back and the report, on two idle cores.
RESERVED_SECONDS = 40.0
MOST_RESERVED = 0.3  # of the clock
IDLE_STEP = 0.14  # seconds that a step takes on them
REHEARSED_STEPS = 12
LOOK_UP_SHARE = 0.4  # most of the time that the look-up phase may take
PANEL_SHARE = {"one_word": 0.45, "follow_up": 0.45, "dense": 0.35, "dense_first": 0.35}
LOOK_UP_PANELS = {"one_word": 0.6}  # letters are the hardest to look up
# Last share of the steps, over which the learning rate falls: behind a look-up phase, and without one.
DECAY, DECAY_ALONE = 0.55, 0.4


class PacedTrainer(GenerationTrainer):
    """A phase whose learning rate falls with the steps or with what is spent, whichever is further on.

    On an idle machine the steps lead and the run repeats exactly; on a busy one it still ends on time, fully decayed.
    """

    share_spent: Callable[[], float] = staticmethod(lambda: 0.0)
    decay = DECAY

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Warm-up over 50 steps, constant, linear decay over the last steps."""

        def factor(step: int) -> float:
            done = max(step / num_training_steps, self.share_spent())
            falling = (1 - done) / self.decay if self.decay else 1.0
            return max(0.0, min(1.0, (step + 1) / 50, falling))

        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(chosen, factor)
        return self.lr_scheduler


class StepTimer(TrainerCallback):
    """Seconds per step, the first ones left out."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.times: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """Mean over the steps that count."""
        times = self.times[self.skip :]
        return (times[-1] - times[0]) / (len(times) - 1)


def look_up_arguments(settings: Settings, folder: Path, steps: int) -> GenerationArguments:
    """One-word questions at m = 1, until their loss says that looking up is learned."""
    return GenerationArguments(
        **{**common_arguments(settings, folder / "logs", steps), "until_loss_steps": min(50, max(2, steps // 4))},
        until_loss=settings.look_up_loss,
        loss_per="answer",
    )


def elastic_arguments(settings: Settings, folder: Path, steps: int, planned: int) -> GenerationArguments:
    """Every kind of conversation in a micro-batch of its own, its m drawn from the whole range."""
    common = common_arguments(settings, folder / "logs", steps)
    shared: dict[str, Any] = {
        "elastic_warmup_fraction": settings.elastic_warmup_fraction * planned / steps,
        "elastic_warmup_minimum": settings.max_num_visual_tokens,
        "elastic_seed": settings.seed,
    }
    if not settings.look_up_first:
        counts = list(settings.num_visual_tokens)
        return GenerationArguments(
            **common, **shared, elastic_num_visual_tokens=counts, elastic_probabilities=elastic_probabilities(settings)
        )
    dense = [kind for kind, _ in settings.groups if kind.startswith("dense")]
    return GenerationArguments(
        **common,
        **shared,
        batch_groups=dict(settings.groups),
        elastic_range=[1, settings.max_num_visual_tokens],
        elastic_by_source=dict.fromkeys(dense, settings.dense_counts),
        elastic_per_sample_sources=dense,  # one m for all of them, and some m are hardly ever trained
        elastic_warmup_sources=dense,
        elastic_followup=[m for m in settings.followups if m <= settings.max_num_visual_tokens],
        loss_per="answer",
    )


def elastic_probabilities(settings: Settings) -> list[float]:
    """Probability of each listed m: equal, but for the largest, which has the most queries to teach."""
    weights = np.array(
        [settings.largest_m_weight if m == settings.max_num_visual_tokens else 1.0 for m in settings.num_visual_tokens]
    )
    return (weights / weights.sum()).tolist()


def elastic_conversations(settings: Settings, samples: list, features: torch.Tensor, steps: int) -> Conversations:
    """Training conversations of the elastic phase."""
    if not settings.look_up_first:
        return Conversations(samples, features, steps * settings.batch_size, settings.seed)
    kinds = [kind for kind, count in settings.groups for _ in range(count)]
    return Conversations(samples, features, steps * len(kinds), settings.seed, kinds, PANEL_SHARE)


def make_trainer(
    model: Any,
    processor: Any,
    dataset: Conversations,
    arguments: GenerationArguments,
    callbacks: Sequence[TrainerCallback] = (),
    num_visual_tokens: int | None = None,
) -> PacedTrainer:
    """Trainer of a phase; nothing of it goes to standard output, where only results belong."""
    largest = max(arguments.elastic_counts() or (), default=num_visual_tokens)
    collator = ConversationCollator(
        processor, num_visual_tokens=largest, num_followup_visual_tokens=max(arguments.elastic_followup or [1])
    )
    trainer = PacedTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=processor, data_collator=collator,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_generation_trainer(
    settings: Settings,
    model: Any,
    processor: Any,
    dataset: Conversations,
    folder: Path,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
    planned_steps: int | None = None,
) -> PacedTrainer:
    """Trainer of the elastic phase; the first part of the planned steps is at the largest m."""
    arguments = elastic_arguments(settings, folder, steps, planned_steps or steps)
    trainer = make_trainer(model, processor, dataset, arguments, callbacks)
    trainer.decay = DECAY if settings.look_up_first else DECAY_ALONE
    return trainer


@dataclass(frozen=True)
class Rehearsal:
    """What a step of the elastic phase costs: wall-clock seconds on this machine as busy as it is, and model FLOPs."""

    seconds_per_step: float
    tflops_per_step: float


def rehearse(settings: Settings, model: Any, processor: Any, dataset: Conversations, folder: Path) -> Rehearsal:
    """Take a few steps of the elastic phase, and undo them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timer = StepTimer(skip=2)
    trainer = make_generation_trainer(settings, model, processor, dataset, folder, REHEARSED_STEPS, [timer])
    trainer.train()
    model.load_state_dict(state)
    return Rehearsal(timer.seconds_per_step(), trainer.throughput.total_flops / 1e12 / REHEARSED_STEPS)


class Meter:
    """Model FLOPs that the phases of an entrant have spent."""

    def __init__(self) -> None:
        self.trainers: list[PacedTrainer] = []

    def tflops(self) -> float:
        """In 10^12, as `trainers.callbacks.throughput` counts them."""
        return sum(trainer.throughput.total_flops for trainer in self.trainers) / 1e12


@dataclass
class Material:
    """What stage 2 trains on, and where it may leave files."""

    samples: list
    features: torch.Tensor
    folder: Path
    meter: Meter = field(default_factory=Meter)


def look_up(settings: Settings, model: Any, processor: Any, material: Material, allowance: Allowance) -> dict[str, Any]:
    """The phase before the elastic one: one-word questions alone, until their loss is low."""
    set_seed(settings.seed + 3)
    steps = settings.look_up_steps
    dataset = Conversations(
        material.samples,
        material.features,
        steps * settings.batch_size,
        settings.seed,
        ("one_word",),
        LOOK_UP_PANELS,
    )
    with contextlib.closing(progress(total=steps, description="stage 2 (look-up)")) as bar:
        callback = BarCallback(bar, lambda: allowance.share() >= 1)
        arguments = look_up_arguments(settings, material.folder, steps)
        trainer = make_trainer(model, processor, dataset, arguments, [callback], num_visual_tokens=1)
        material.meter.trainers.append(trainer)
        trainer.decay = 0.0
        trainer.train()
    until, taken = trainer.until_loss, trainer.state.global_step
    is_reached = until is not None and until.is_reached
    if callback.ran_out and not is_reached:
        say(f"The look-up phase was cut after {taken} of at most {steps} steps, before its loss had fallen.")
    return {"steps": taken, "ended_by_its_loss": is_reached, "last_loss": until.mean if until is not None else None}


def train_generation(
    settings: Settings, model: Any, processor: Any, material: Material, clock: Clock
) -> dict[str, Any]:
    """Stage 2 within what is left of the clock."""
    record: dict[str, Any] = {}
    began, allowance = time.process_time(), clock.allowance(RESERVED_SECONDS)
    if settings.look_up_first:
        record["look_up"] = look_up(settings, model, processor, material, allowance.part(LOOK_UP_SHARE))
    set_seed(settings.seed + 4)
    steps = settings.generation_steps
    dataset = elastic_conversations(settings, material.samples, material.features, steps)
    seconds = rehearse(settings, model, processor, dataset, material.folder).seconds_per_step
    # A busy machine needs longer for what follows; but never so long that nothing is left to train in.
    reserve = min(RESERVED_SECONDS * max(1.0, seconds / IDLE_STEP), MOST_RESERVED * clock.budget)
    allowance = clock.allowance(reserve)
    planned = max(1, min(steps, int(allowance.amount / seconds)))
    record.update(train_elastic(settings, model, processor, dataset, material, planned, allowance))
    if record["steps"] < steps:
        say(f"The clock allowed {record['steps']} of {steps} stage-2 steps.")
    spent = {"tflops": material.meter.tflops(), "cpu_seconds": time.process_time() - began}
    return {**record, "seconds_per_step": seconds, **{name: round(value, 3) for name, value in spent.items()}}


def train_to_equal_compute(
    settings: Settings, model: Any, processor: Any, material: Material, tflops: float
) -> dict[str, Any]:
    """Stage 2 until so many model FLOPs are spent; the settings' own number of steps does not count."""
    record: dict[str, Any] = {}
    began = time.process_time()
    allowance = Allowance(material.meter.tflops, 0.0, tflops)
    if settings.look_up_first:
        record["look_up"] = look_up(settings, model, processor, material, allowance)
    set_seed(settings.seed + 4)
    dataset = elastic_conversations(settings, material.samples, material.features, 2 * REHEARSED_STEPS)
    per_step = rehearse(settings, model, processor, dataset, material.folder).tflops_per_step
    planned = max(1, round((tflops - material.meter.tflops()) / per_step))
    # A few more than planned: what ends the phase is the compute it has spent.
    settings = replace(settings, generation_steps=ceil(1.1 * planned) + 5)
    dataset = elastic_conversations(settings, material.samples, material.features, settings.generation_steps)
    record.update(train_elastic(settings, model, processor, dataset, material, planned, allowance))
    spent = {"tflops": material.meter.tflops(), "cpu_seconds": time.process_time() - began}
    return {**record, **{name: round(value, 3) for name, value in spent.items()}}


def train_elastic(
    settings: Settings,
    model: Any,
    processor: Any,
    dataset: Conversations,
    material: Material,
    planned: int,
    allowance: Allowance,
) -> dict[str, Any]:
    """The elastic phase, until its steps are taken or its allowance is spent."""
    steps = settings.generation_steps
    with contextlib.closing(progress(total=steps, description="stage 2 (generation, elastic m)")) as bar:
        callback = BarCallback(bar, lambda: allowance.share() >= 1)
        trainer = make_generation_trainer(
            settings, model, processor, dataset, material.folder, steps, [callback], planned
        )
        material.meter.trainers.append(trainer)
        trainer.share_spent = allowance.share
        outcome = trainer.train()
    return {"steps": trainer.state.global_step, "planned_steps": steps, "mean_loss": outcome.training_loss}

"""Both training stages at toy sizes, with the package's own model, processor, collator and trainers."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from fusedvlm.console import progress
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import VISION_PREFIXES
from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMProcessor, build_processor
from fusedvlm.trainers import ContrastiveArguments, ContrastiveTrainer

from .kinds import Conversations
from .language import build_tokenizer
from .settings import Settings

TILE = 32


class Clock:
    """The run's time budget."""

    def __init__(self, minutes: float) -> None:
        self.started = time.monotonic()
        self.budget = minutes * 60

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.budget - self.elapsed())

    def allowance(self, reserve: float) -> "Allowance":
        """What is left now but for `reserve` seconds, to be spent."""
        return Allowance(self.elapsed, self.elapsed(), max(self.left() - reserve, 1.0))


@dataclass(frozen=True)
class Allowance:
    """So much of a growing quantity (seconds of a clock, counted FLOPs) may be spent from a start on."""

    spent_so_far: Callable[[], float]
    start: float
    amount: float

    def share(self) -> float:
        """Share of it that is spent; 1 or more when nothing is left."""
        return (self.spent_so_far() - self.start) / self.amount

    def part(self, share: float) -> "Allowance":
        """The first `share` of it."""
        return Allowance(self.spent_so_far, self.start, self.amount * share)


def build_variant(settings: Settings, llm_folder: str) -> tuple[FusedVLMForConditionalGeneration, FusedVLMProcessor]:
    """An untrained variant over the frozen language model, and its processor."""

    tokenizer = build_tokenizer()
    set_seed(settings.seed + 1)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=settings.vision_width,
            intermediate_size=settings.vision_width * 2,
            num_hidden_layers=settings.vision_layers,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=8,
        )
    )
    model = FusedVLMForConditionalGeneration.from_backbones(
        vision,
        llm_folder,
        num_visual_tokens=settings.max_num_visual_tokens,
        num_followup_visual_tokens=1,
        trained_num_visual_tokens=settings.trained_num_visual_tokens,
        max_local_views=4,
        fuse_question=settings.fuse_question,
        query_vocab_size=tokenizer.vocab_size,
        query_eos_token_id=tokenizer.eos_token_id,
        # Visual tokens start at the scale of the language model's embeddings.
        projector_initializer_range=0.5 / settings.vision_width**0.5,
        fuser_config={
            "num_hidden_layers": settings.fuser_layers,
            "num_attention_heads": 4,
            "initializer_range": 0.08,
            # Rows are short here: a small base tells neighboring places apart more sharply than Llama's 10,000.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    )
    torch.nn.init.normal_(model.model.fuser.embed_tokens.weight, std=0.5)
    processor = build_processor(model.config, query_tokenizer=tokenizer, image_processor=image_processor())
    return model, processor


def image_processor() -> FusedVLMImageProcessor:
    """Two by two local views of 32 pixels, and the global one."""
    return FusedVLMImageProcessor(size={"height": TILE, "width": TILE}, max_local_views=4)


class BarCallback(TrainerCallback):
    """Progress bar of a stage, and a stop when what it may spend is spent."""

    def __init__(self, bar: Any, is_spent: Callable[[], bool] = lambda: False) -> None:
        self.bar, self.is_spent = bar, is_spent
        self.ran_out = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance; stop in time for what comes after."""
        self.bar.update(1)
        if self.is_spent():
            self.ran_out = state.global_step < state.max_steps
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def common_arguments(settings: Settings, folder: Path, steps: int) -> dict:
    """Trainer arguments of both stages."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "max_steps": steps,
        "learning_rate": settings.learning_rate,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": int(0.4 * steps), "decay_type": "linear"},
        "warmup_steps": min(50, steps // 4),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "freeze": list(VISION_PREFIXES),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": max(1, min(20, steps // 4)),
        "dataloader_num_workers": 1,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def train_contrastive(
    settings: Settings,
    model: FusedVLMForConditionalGeneration,
    processor: FusedVLMProcessor,
    samples: Any,
    features: Any,
    folder: Path,
) -> dict[str, float]:
    """Stage 1 on cached view tokens; the result is saved for stage 2 to load by name."""
    set_seed(settings.seed + 2)
    answer_config = CLIPTextConfig(
        vocab_size=len(processor.query_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=processor.query_tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    config = type(model.config).from_dict(
        {**model.config.to_dict(), "answer_config": answer_config.to_dict(), "projection_dim": 64}
    )
    stage1 = FusedVLMForContrastiveLearning(config)
    stage1.model.load_state_dict(model.model.state_dict(), strict=False)
    steps = settings.contrastive_steps
    dataset = Conversations(samples, features, steps * settings.batch_size, settings.seed, kinds=("dense",))
    with contextlib.closing(progress(total=steps, description="stage 1 (contrastive)")) as bar:
        trainer = ContrastiveTrainer(
            model=stage1,
            args=ContrastiveArguments(**{**common_arguments(settings, folder / "logs", steps), "learning_rate": 1e-3}),
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[BarCallback(bar)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints on standard output, where only results belong
        trainer.train()
    stage1.save_pretrained(folder)
    logged = [row for row in trainer.state.log_history if "retrieval_at_1" in row]
    return {name: logged[-1][name] for name in ("contrastive_loss", "identity_loss", "retrieval_at_1")}

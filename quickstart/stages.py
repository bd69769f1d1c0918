"""Both training stages at toy sizes, with the package's own model, processor, collator and trainers."""

import contextlib
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel, PrinterCallback, TrainerCallback, set_seed

from fusedvlm.console import progress, say
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import VISION_PREFIXES
from fusedvlm.processing import FusedVLMImageProcessor, build_processor
from fusedvlm.trainers import (
    ContrastiveArguments,
    ContrastiveTrainer,
    ConversationCollator,
    GenerationArguments,
    GenerationTrainer,
)

from .language import build_tokenizer
from .settings import Settings

TILE = 32
# Seconds kept back for evaluation, saving, loading back and the report, on two idle cores.
RESERVED_SECONDS = 25.0


class Clock:
    """The run's time budget."""

    def __init__(self, minutes: float):
        self.started = time.monotonic()
        self.budget = minutes * 60

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.budget - self.elapsed())


def build_variant(settings: Settings, llm_folder: str):
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
        trained_num_visual_tokens=list(settings.num_visual_tokens),
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


class Conversations(torch.utils.data.Dataset):
    """Image number k of the training world with freshly drawn questions, as conversations over cached view tokens."""

    def __init__(self, samples, features: torch.Tensor, length: int, seed: int, num_questions: int = 2, dense=True):
        self.samples, self.features, self.length = samples, features, length
        self.seed, self.num_questions, self.dense = seed, num_questions, dense

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        generator = np.random.default_rng([self.seed, 2, index])
        number = int(generator.integers(len(self.samples)))
        questions = self.samples[number].draw_questions(generator, self.num_questions, self.dense)
        messages = []
        for turn, question in enumerate(questions):
            content = ([{"type": "image"}] if turn == 0 else []) + [{"type": "text", "text": question.text}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        return {"messages": messages, "view_features": self.features[number].float()}


class BarCallback(TrainerCallback):
    """Progress bar of a stage, and a stop when the clock runs out."""

    def __init__(self, bar, clock: Clock | None = None, reserve: float = 0.0):
        self.bar, self.clock, self.reserve = bar, clock, reserve
        self.ran_out = False

    def on_step_end(self, args, state, control, **kwargs):
        """Advance; stop in time for what comes after."""
        self.bar.update(1)
        if self.clock is not None and self.clock.left() < self.reserve:
            self.ran_out = True
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
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


def train_contrastive(settings: Settings, model, processor, samples, features, folder: Path) -> dict[str, float]:
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
    dataset = Conversations(samples, features, steps * settings.batch_size, settings.seed, num_questions=0)
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


def elastic_probabilities(settings: Settings) -> list[float]:
    """Probability of each m: equal, but for the largest, which has the most queries to teach."""
    weights = np.array(
        [settings.largest_m_weight if m == settings.max_num_visual_tokens else 1.0 for m in settings.num_visual_tokens]
    )
    return (weights / weights.sum()).tolist()


class ClockedTrainer(GenerationTrainer):
    """Stage 2 whose learning rate falls with the steps or the clock, whichever is further on.

    On an idle machine the steps lead and the run repeats exactly; on a busy one it still ends on time, fully decayed.
    """

    progress_of_clock = staticmethod(lambda: 0.0)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Warm-up over 50 steps, constant, linear decay over the last 40 %."""

        def factor(step: int) -> float:
            done = max(step / num_training_steps, self.progress_of_clock())
            return max(0.0, min(1.0, (step + 1) / 50, (1 - done) / 0.4))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


def make_generation_trainer(
    settings: Settings, model, processor, dataset, folder: Path, steps: int, callbacks, planned_steps: int | None = None
) -> ClockedTrainer:
    """Trainer of stage 2 with elastic m; the first part of the planned steps is at the largest."""
    arguments = GenerationArguments(
        **common_arguments(settings, folder / "logs", steps),
        elastic_num_visual_tokens=list(settings.num_visual_tokens),
        elastic_probabilities=elastic_probabilities(settings),
        elastic_warmup_fraction=settings.elastic_warmup_fraction * (planned_steps or steps) / steps,
        elastic_warmup_minimum=settings.max_num_visual_tokens,
        elastic_seed=settings.seed,
    )
    trainer = ClockedTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=ConversationCollator(processor, num_visual_tokens=settings.max_num_visual_tokens),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it prints on standard output, where only results belong
    return trainer


class StepTimer(TrainerCallback):
    """Seconds per step, the first ones left out."""

    def __init__(self, skip: int):
        self.skip, self.times = skip, []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        self.times.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """Mean over the steps that count."""
        times = self.times[self.skip :]
        return (times[-1] - times[0]) / (len(times) - 1)


def rehearse(settings: Settings, model, processor, dataset, folder: Path) -> float:
    """Seconds per stage-2 step on this machine as busy as it is now, from a few steps that are undone."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timer = StepTimer(skip=2)
    make_generation_trainer(settings, model, processor, dataset, folder, 12, [timer]).train()
    model.load_state_dict(state)
    return timer.seconds_per_step()


def train_generation(settings: Settings, model, processor, samples, features, folder: Path, clock: Clock) -> dict:
    """Stage 2 within what is left of the clock."""
    set_seed(settings.seed + 3)
    dataset = Conversations(samples, features, settings.generation_steps * settings.batch_size, settings.seed)
    seconds = rehearse(settings, model, processor, dataset, folder)
    reserve = RESERVED_SECONDS * max(1.0, seconds / 0.12)
    steps, started = settings.generation_steps, clock.elapsed()
    available = max(clock.left() - reserve, 1.0)
    planned = max(1, min(steps, int(available / seconds)))
    with contextlib.closing(progress(total=steps, description="stage 2 (generation, elastic m)")) as bar:
        callback = BarCallback(bar, clock, reserve)
        trainer = make_generation_trainer(settings, model, processor, dataset, folder, steps, [callback], planned)
        trainer.progress_of_clock = lambda: (clock.elapsed() - started) / available
        outcome = trainer.train()
    if callback.ran_out:
        say(f"The clock allowed {trainer.state.global_step} of {steps} stage-2 steps.")
    return {"steps": trainer.state.global_step, "seconds_per_step": seconds, "mean_loss": outcome.training_loss}

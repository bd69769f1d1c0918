"""A family of variants from scratch in minutes: every stage with the package's own classes, at toy sizes.

language model (text only, frozen afterwards)  |  in parallel: render images, vision warm-up, cache view tokens
stage 1: ContrastiveTrainer                     fusion states of questions against their answers
stage 2: GenerationTrainer, elastic m           answers through the frozen language model
evaluation at every m, on held-out images       free decoding, also with images swapped between questions
one folder per m, loaded back through AutoModelForImageTextToText
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging as hf_logging

from fusedvlm.console import progress, say
from fusedvlm.evaluation import EvaluationResults, answer_questions, describe_environment, measure_latency, summarise
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.processing import FusedVLMImageProcessor, build_processor
from fusedvlm.scaling import PowerLawFit, fit_power_law
from fusedvlm.trainers import (
    ContrastiveArguments,
    ContrastiveTrainer,
    ConversationCollator,
    GenerationArguments,
    GenerationTrainer,
)

from . import world
from .settings import Settings
from .vision import cell_labels, encode_views, process_images, warm_up_vision

TILE = 32
FROZEN_VISION = ["model.vision_tower.", "model.merger."]
HELD_OUT_WORLD = 1_000_000  # index offset of held-out images
# Seconds kept back for evaluation, saving, loading back and the report, on two idle cores.
RESERVED_SECONDS = 45.0


@dataclass
class Family:
    """What one run produced."""

    folder: Path
    results: EvaluationResults
    swapped: EvaluationResults
    fit: PowerLawFit | None
    examples: list[dict] = field(default_factory=list)
    stages: dict[str, float | str] = field(default_factory=dict)

    def mean_scores(self, swapped: bool = False) -> dict[int, float]:
        """Mean over tasks at each m."""
        scores = (self.swapped if swapped else self.results).scores
        counts = sorted({score.num_visual_tokens for score in scores})
        return {m: float(np.mean([s.score for s in scores if s.num_visual_tokens == m])) for m in counts}

    def variant_folder(self) -> Path:
        """Folder of the variant with the largest m."""
        return self.folder / f"fusedvlm-m{max(self.mean_scores())}"


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


# -- language model ----------------------------------------------------------------------------------------------------


class LanguageModelProcess:
    """Pretrain the language model in a process of its own, so that it shares the machine with the vision warm-up."""

    def __init__(self, settings: Settings, folder: Path):
        self.folder = folder
        self.last_loss = float("nan")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.partial = partial
        command = [
            sys.executable,
            "-m",
            "fusedvlm.quickstart.language",
            "--folder",
            str(partial),
            "--steps",
            str(settings.llm_steps),
            "--seed",
            str(settings.seed),
            "--width",
            str(settings.llm_width),
            "--layers",
            str(settings.llm_layers),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.bar = progress(total=settings.llm_steps, description="language model (text)", position=1, leave=True)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.errors: list[str] = []
        self.threads = [
            threading.Thread(target=self._follow, daemon=True),
            threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def _follow(self) -> None:
        for line in self.process.stdout:
            step, loss = line.split()
            self.last_loss = float(loss)
            self.bar.update(int(step) - self.bar.n)
            self.bar.set_postfix(loss=loss)

    def wait(self) -> float:
        """Wait until it is trained and saved; returns its last loss. Raises `RuntimeError` if it fails."""
        code = self.process.wait()
        for thread in self.threads:
            thread.join()
        self.bar.close()
        if code != 0:
            raise RuntimeError(f"Pretraining the language model failed: {''.join(self.errors[-3:]).strip()}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.rename(self.folder)
        return self.last_loss

    def stop(self) -> None:
        """End the process if it still runs."""
        self.process.kill()


# -- model -------------------------------------------------------------------------------------------------------------


def build_variant(settings: Settings, llm_folder: str):
    """An untrained variant over the frozen language model, and its processor."""
    from .language import build_tokenizer

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
            # Rows are short here: a small base tells neighbouring places apart more sharply than Llama's 10,000.
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
        "freeze": FROZEN_VISION,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 20,
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
        trainer.train()
    stage1.save_pretrained(folder)
    logged = [row for row in trainer.state.log_history if "retrieval_at_1" in row]
    return {name: logged[-1][name] for name in ("contrastive_loss", "identity_loss", "retrieval_at_1")}


def make_generation_trainer(settings: Settings, model, processor, dataset, folder: Path, steps: int, callbacks):
    """Trainer of stage 2 with elastic m."""
    arguments = GenerationArguments(
        **common_arguments(settings, folder / "logs", steps),
        elastic_num_visual_tokens=list(settings.num_visual_tokens),
        elastic_warmup_fraction=0.3,
        elastic_warmup_minimum=8,
        elastic_seed=settings.seed,
    )
    return GenerationTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=ConversationCollator(processor, num_visual_tokens=settings.max_num_visual_tokens),
        callbacks=callbacks,
    )


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
    reserve = RESERVED_SECONDS * max(1.0, seconds / 0.11)
    affordable = int((clock.left() - reserve) / seconds)
    steps = min(settings.generation_steps, max(affordable, settings.min_generation_steps))
    if steps < settings.generation_steps:
        say(f"The clock allows {steps} of {settings.generation_steps} stage-2 steps ({seconds:.2f} s each).")
    with contextlib.closing(progress(total=steps, description="stage 2 (generation, elastic m)")) as bar:
        callback = BarCallback(bar, clock, reserve / 2)
        trainer = make_generation_trainer(settings, model, processor, dataset, folder, steps, [callback])
        trainer.train()
    if callback.ran_out:
        say(f"The clock ran out: stage 2 stopped after {trainer.state.global_step} of {steps} steps.")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"steps": trainer.state.global_step, "seconds_per_step": seconds, "last_loss": losses[-1]}


# -- evaluation --------------------------------------------------------------------------------------------------------


def held_out_questions(settings: Settings) -> tuple[list[world.Sample], dict[str, list[tuple[int, world.Question]]]]:
    """Held-out images, and per task questions as (image number, question)."""
    first = HELD_OUT_WORLD + settings.seed * settings.num_held_out
    samples = [world.make_sample(settings.seed, first + index) for index in range(settings.num_held_out)]
    generator = np.random.default_rng([settings.seed, 3])
    questions: dict[str, list] = {task: [] for task in world.TASKS}
    for number, sample in enumerate(samples):
        dense = sample.dense_question()
        questions[dense.task].append((number, dense))
        for task in sample.cell_tasks():
            cell = list(sample.content)[generator.integers(len(sample.content))]
            questions[task].append((number, sample.cell_question(task, cell)))
    return samples, {task: asked[: settings.questions_per_task] for task, asked in questions.items()}


def evaluate(model, processor, settings: Settings, questions, features, command: str, swapped: bool):
    """Score every task at every m by free decoding; swapped images come from the next question of the same task."""
    results = EvaluationResults(describe_environment(command))
    total = len(settings.num_visual_tokens) * sum(len(asked) for asked in questions.values())
    name = "evaluation, images swapped" if swapped else "evaluation"
    with contextlib.closing(progress(total=total, description=name)) as bar:
        for m in settings.num_visual_tokens:
            for task, asked in questions.items():
                numbers = np.array([number for number, _ in asked])
                numbers = np.roll(numbers, 1) if swapped else numbers
                answers = answer_questions(
                    model,
                    processor,
                    [question.text for _, question in asked],
                    m,
                    view_features=features[torch.from_numpy(numbers)],
                    max_new_tokens=52 if task in ("list", "read") else 3,
                    batch_size=128,
                    on_batch=bar.update,
                )
                scores = [world.score(task, a, q.answer) for a, (_, q) in zip(answers, asked, strict=True)]
                results.scores.append(summarise(task, m, scores))
    return results


def save_family(settings: Settings, model, processor, folder: Path) -> list[Path]:
    """One self-contained folder per m: the tiny language model is published nowhere, so each variant carries it."""
    folders = []
    for m in settings.num_visual_tokens:
        target, partial = folder / f"fusedvlm-m{m}", folder / f"fusedvlm-m{m}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.config.num_visual_tokens = processor.num_visual_tokens = m
        reference, model.config.text_model_name_or_path = model.config.text_model_name_or_path, None
        model.save_pretrained(partial, merged=True)
        model.config.text_model_name_or_path = reference
        processor.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        folders.append(target)
    return folders


def load_and_ask(folders: list[Path], samples: list[world.Sample], seed: int) -> tuple[list[dict], list]:
    """Load every variant as a user would, ask it about held-out images, and time it."""
    shown = [next(s for s in samples if s.is_scene), next(s for s in samples if not s.is_scene)]
    generator = np.random.default_rng([seed, 4])
    asked = []
    for sample in shown:
        cells = generator.choice(list(sample.content), 2, replace=False)
        questions = [
            sample.cell_question(task, cell) for task, cell in zip(sample.cell_tasks() * 2, cells, strict=False)
        ]
        asked.append((sample, [*questions[:2], sample.dense_question()]))
    examples = [
        {"question": q.text, "expected": q.answer, "task": q.task, "sample": s, "answers": {}}
        for s, qs in asked
        for q in qs
    ]
    latencies = []
    for folder in progress(folders, description="loading variants back"):
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        m = model.config.num_visual_tokens
        for example in examples:
            answer = answer_questions(
                model, processor, [example["question"]], m, images=[example["sample"].image], max_new_tokens=52
            )[0]
            example["answers"][m] = answer
        latencies.append(measure_latency(model, processor, shown[0].image, examples[0]["question"], m))
    return examples, latencies


# -- the whole run -----------------------------------------------------------------------------------------------------


def prepare_images(settings: Settings, processor_images, device_samples: int):
    """Render and process the training images; (samples, pixels in half precision, labels)."""
    samples, pixels = [], []
    for start in progress(range(0, device_samples, 256), description="rendering images"):
        part = [world.make_sample(settings.seed, i) for i in range(start, min(start + 256, device_samples))]
        pixels.append(process_images(processor_images, part).half())
        samples += part
    labels = torch.from_numpy(np.stack([cell_labels(sample) for sample in samples]))
    return samples, torch.cat(pixels), labels


def run(settings: Settings, output: Path, command: str) -> Family:
    """Train, evaluate, save and reload one family of variants.

    Args:
        settings: sizes and budget.
        output: folder of the family; earlier variants in it are replaced only by finished ones.
        command: what the user typed, for the record.

    Raises:
        RuntimeError: when the language model could not be trained.
    """
    clock = Clock(settings.minutes)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages: dict = {}
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    language = LanguageModelProcess(settings, output / "llm")
    try:
        # The vision side needs no language model yet, so it is built over an untrained one meanwhile.
        samples, features, held_out, questions, vision_state = _vision_side(settings, output, device, stages)
        stages["language_model_loss"] = language.wait()
    except BaseException:
        language.stop()
        raise
    stages["seconds_until_towers"] = round(clock.elapsed(), 1)
    model, processor = build_variant(settings, str(output / "llm"))
    model.load_state_dict(vision_state, strict=False)
    stages["contrastive"] = train_contrastive(settings, model, processor, samples, features, output / "stage1")
    model = FusedVLMForConditionalGeneration.from_pretrained(output / "stage1")
    stages["generation"] = train_generation(settings, model, processor, samples, features, output / "stage2", clock)
    stages["seconds_until_trained"] = round(clock.elapsed(), 1)
    held_out_samples, held_out_features = held_out
    results = evaluate(model, processor, settings, questions, held_out_features, command, swapped=False)
    swapped = evaluate(model, processor, settings, questions, held_out_features, command, swapped=True)
    folders = save_family(settings, model.cpu(), processor, output)
    examples, results.latencies = load_and_ask(folders, held_out_samples, settings.seed)
    stages["seconds_total"] = round(clock.elapsed(), 1)
    family = Family(output, results, swapped, None, examples, stages)
    means = family.mean_scores()
    if min(means.values()) > 0:  # a power law has no zeros
        family.fit = fit_power_law(list(means), list(means.values()))
    save_record(family, settings)
    return family


def _vision_side(settings: Settings, output: Path, device, stages: dict):
    """Render, warm up, cache: training samples and features, held-out ones, questions, trained vision weights."""
    from .language import build_model, build_tokenizer

    stand_in = output / "llm-untrained"
    tokenizer = build_tokenizer()
    build_model(tokenizer, settings.llm_width, settings.llm_layers).save_pretrained(stand_in)
    tokenizer.save_pretrained(stand_in)
    model, processor = build_variant(settings, str(stand_in))
    shutil.rmtree(stand_in)
    model.to(device)
    samples, pixels, labels = prepare_images(settings, processor, settings.num_images)
    with contextlib.closing(progress(total=settings.warmup_steps, description="vision warm-up")) as bar:

        def on_step(accuracy: float) -> None:
            bar.update(1)
            bar.set_postfix(cells_right=f"{accuracy:.3f}")

        stages["vision_warmup_cells_right"] = warm_up_vision(
            model, pixels, labels, settings.warmup_steps, settings.batch_size, settings.seed, device, on_step
        )
    model.eval()
    with contextlib.closing(progress(total=len(pixels), description="caching view tokens")) as bar:
        features = encode_views(model, pixels, device, on_batch=bar.update)
    held_out, questions = held_out_questions(settings)
    held_out_features = encode_views(model, process_images(processor, held_out), device)
    vision_state = {n: t.cpu() for n, t in model.state_dict().items() if n.startswith(tuple(FROZEN_VISION))}
    return samples, features, (held_out, held_out_features), questions, vision_state


def save_record(family: Family, settings: Settings) -> None:
    """Write results.json, swapped.json and run.json beside the variants."""
    family.results.save(family.folder / "results.json")
    family.swapped.save(family.folder / "swapped.json")
    record = {
        "settings": asdict(settings),
        "stages": family.stages,
        "mean_score": family.mean_scores(),
        "mean_score_swapped": family.mean_scores(swapped=True),
        "fit": None if family.fit is None else asdict(family.fit),
        "examples": [{k: v for k, v in example.items() if k != "sample"} for example in family.examples],
    }
    (family.folder / "run.json").write_text(json.dumps(record, indent=2, allow_nan=False), encoding="utf-8")

"""The work of a lab, piece by piece: each whole or not there, locked by whoever does it, skipped when it is done."""

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusedvlm.console import progress
from fusedvlm.costs.environment import load_average
from fusedvlm.evaluation import EvaluationResults, describe_environment, summarize
from fusedvlm.files import read_json, write_json
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.processing import FusedVLMProcessor
from fusedvlm.quickstart import world
from fusedvlm.quickstart.family import Questions, evaluate, held_out_questions
from fusedvlm.quickstart.language import build_tokenizer, pretrain
from fusedvlm.quickstart.phases import Material, train_generation
from fusedvlm.quickstart.preparation import vision_side
from fusedvlm.quickstart.settings import Settings
from fusedvlm.quickstart.stages import Clock, build_variant
from fusedvlm.scaling import DivergenceStatistics, ImageBranches, summarize as summarize_divergence
from fusedvlm.scaling.divergence.pairs import ImagePair

from .lab_plan import LabPlan, Training

VISION, LLM, TRAINING = "vision", "llm", "training"
LEAST_MINUTES = 0.05  # of a training that a spent clock leaves


@dataclass(frozen=True)
class Job:
    """Something to be done once: the vision side, a language model, or one set of weights with all its m."""

    kind: str
    name: str
    needs: tuple[str, ...] = ()
    training: Training | None = None
    llm_width: int = 0


def list_jobs(plan: LabPlan) -> list[Job]:
    """In the order of work."""
    llms = [Job(LLM, f"llm{width}", llm_width=width) for width in plan.llm_widths]
    trainings = [Training(width, reads) for width in plan.llm_widths for reads in (True, False)]
    return [
        Job(VISION, VISION),
        *llms,
        *(Job(TRAINING, one.name, (VISION, f"llm{one.llm_width}"), one, one.llm_width) for one in trainings),
    ]


class LabFolder:
    """One run folder: `plan.json`, `vision/`, `llms/`, `variants/`.

    Args:
        plan: sizes.
        folder: the run folder.
        command: what the user typed, for the record.
        deadline: `time.time()` at which the clock is spent; None never cuts a training.
        workers: processes that share the trainings.
    """

    def __init__(
        self, plan: LabPlan, folder: Path, command: str, deadline: float | None = None, workers: int = 1
    ) -> None:
        self.plan, self.folder, self.command = plan, folder, command
        self.deadline, self.workers = deadline, workers
        self.jobs = list_jobs(plan)

    def variant(self, training: Training) -> Path:
        """Folder of one set of weights, its results beside them."""
        return self.folder / "variants" / training.name

    def is_done(self, job: Job) -> bool:
        """Whether everything of it is there."""
        if job.kind == VISION:
            return (self.folder / VISION / "done.json").exists()
        if job.kind == LLM:
            return (self.folder / "llms" / job.name / "text_scores.json").exists()
        assert job.training is not None
        return not self.missing(job.training) and (self.variant(job.training) / "divergence.json").exists()

    def missing(self, training: Training) -> list[int]:
        """The m at which it has not been measured."""
        path = self.variant(training) / "results.json"
        there = {s.num_visual_tokens for s in EvaluationResults.load(path).scores} if path.exists() else set()
        return [m for m in self.plan.num_visual_tokens if m not in there]

    def next_job(self) -> tuple[Job, FileLock] | None:
        """A job that can be done now, and its lock; None when all that is left is somebody else's or must wait."""
        done = {job.name for job in self.jobs if self.is_done(job)}
        for job in self.jobs:
            if job.name in done or not done.issuperset(job.needs):
                continue
            lock = FileLock(self.folder / f"{job.name}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                if not self.is_done(job):
                    return job, lock
                lock.release()
        return None

    def unfinished(self) -> list[Job]:
        """What is not done."""
        return [job for job in self.jobs if not self.is_done(job)]

    def do(self, job: Job) -> None:
        """Do one job."""
        if job.kind == VISION:
            self._prepare_vision()
        elif job.kind == LLM:
            self._pretrain(job)
        elif job.training is not None:
            self._train(job.training)
            self._measure(job.training)
            self._diverge(job.training)

    # Language models

    def _pretrain(self, job: Job) -> None:
        folder, partial = self.folder / "llms" / job.name, self.folder / "llms" / f"{job.name}.partial"
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.closing(progress(total=self.plan.llm_steps, description=f"{job.name}, texts")) as bar:

                def on_step(step: int, loss: float) -> None:
                    bar.update(1)
                    bar.set_postfix(loss=f"{loss:.3f}")

                pretrain(partial, self.plan.llm_steps, self.plan.seed, width=job.llm_width, on_step=on_step)
            partial.rename(folder)
        scores = score_from_texts(folder, self.settings(job.llm_width), self.questions)
        write_json(folder / "text_scores.json", scores)

    def settings(self, llm_width: int, reads_question: bool = True) -> Settings:
        """Of a training."""
        return self.plan.settings(llm_width, reads_question)

    # What all share

    @cached_property
    def held_out(self) -> tuple[list[world.Sample], Questions]:
        """Held-out images and the questions about them, the same for every cell."""
        return held_out_questions(self.settings(self.plan.llm_widths[0]))

    @property
    def questions(self) -> Questions:
        """Per task."""
        return self.held_out[1]

    def _prepare_vision(self) -> None:
        folder = self.folder / VISION
        folder.mkdir(parents=True, exist_ok=True)
        stages: dict[str, Any] = {}
        settings = self.settings(self.plan.llm_widths[0])
        samples, features, (_, held_out), _, state = vision_side(settings, folder, torch.device("cpu"), stages)
        tensors = {"training": features, "held_out": held_out}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "features.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "tower.safetensors")
        contents = [[sample.is_scene, sample.content] for sample in samples]
        write_json(folder / "images.json", contents, indent=None)
        write_json(folder / "done.json", stages)  # last: it says that the rest is whole

    @cached_property
    def features(self) -> dict[str, torch.Tensor]:
        """View tokens of training and held-out images, half precision."""
        return load_file(self.folder / VISION / "features.safetensors")

    @cached_property
    def samples(self) -> list[world.Sample]:
        """Training images without their pixels."""
        contents = read_json(self.folder / VISION / "images.json", list)
        return [
            world.Sample(
                None, scene, {cell: what if isinstance(what, str) else tuple(what) for cell, what in c.items()}
            )
            for scene, c in contents
        ]

    # One set of weights

    def clock(self) -> Clock:
        """This training's share of what the deadline leaves, in equal parts for those that are not done."""
        if self.deadline is None:
            return Clock(24 * 60.0)
        left = [job for job in self.unfinished() if job.kind == TRAINING]
        rounds = max(1, -(-len(left) // self.workers))
        return Clock(max(LEAST_MINUTES, (self.deadline - time.time()) / 60 / rounds))

    def _train(self, training: Training) -> None:
        target = self.variant(training)
        if (target / "config.json").exists():
            return
        settings, clock = self.settings(training.llm_width, training.reads_question), self.clock()
        model, processor = build_variant(settings, str(self.folder / "llms" / f"llm{training.llm_width}"))
        model.load_state_dict(load_file(self.folder / VISION / "tower.safetensors"), strict=False)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        material = Material(self.samples, self.features["training"], partial / "logs")
        stages = train_generation(settings, model, processor, material, clock)
        shutil.rmtree(partial, ignore_errors=True)
        model.config.text_model_name_or_path = None  # the variant carries its language model
        model.save_pretrained(partial, merged=True)
        processor.save_pretrained(partial)
        record = {"training": asdict(training), "stages": stages, "seconds": round(clock.elapsed(), 1)}
        write_json(partial / "lab.json", {**record, "load": load_average()})
        partial.rename(target)

    def _load(self, training: Training) -> tuple[FusedVLMForConditionalGeneration, FusedVLMProcessor]:
        folder = self.variant(training)
        return (
            FusedVLMForConditionalGeneration.from_pretrained(folder).eval(),
            FusedVLMProcessor.from_pretrained(folder),
        )

    def _measure(self, training: Training) -> None:
        path = self.variant(training) / "results.json"
        missing = self.missing(training)
        if not missing:
            return
        results = (
            EvaluationResults.load(path) if path.exists() else EvaluationResults(describe_environment(self.command))
        )
        model, processor = self._load(training)
        settings, features = self.settings(training.llm_width, training.reads_question), self.features["held_out"]
        for m in missing:
            found = evaluate(
                model, processor, settings, self.questions, features, self.command, swapped=False, counts=[m]
            )
            results.scores += found.scores
            results.scores.sort(key=lambda score: score.num_visual_tokens)
            for task, by_m in found.question_scores.items():
                results.question_scores.setdefault(task, {}).update(by_m)
            results.save(path)

    def _diverge(self, training: Training) -> None:
        path = self.variant(training) / "divergence.json"
        if path.exists():
            return
        model, processor = self._load(training)
        largest, record = max(self.plan.num_visual_tokens), {}
        for kind, pairs in draw_pairs(self.held_out[0], self.plan.divergence_pairs, self.plan.seed).items():
            statistics = DivergenceStatistics(largest)
            branches = ImageBranches(model, processor, largest)
            for start in progress(range(0, len(pairs), 16), f"{training.name}, divergence, {kind}", leave=False):
                for number, states in enumerate(branches.states(pairs[start : start + 16]), start):
                    if states is not None:
                        statistics.add(*states, seed=number)
            record[kind] = summarize_divergence(statistics).record()
        write_json(path, record, indent=None)


def draw_pairs(samples: Sequence[world.Sample], count: int, seed: int) -> dict[str, list[ImagePair]]:
    """Pairs of scenes, under a one-word question about a cell both fill, and under the dense question.

    Args:
        samples: held-out images.
        count: pairs of each kind, of the same images.
    """
    generator = np.random.default_rng([seed, 11])
    scenes = [sample for sample in samples if sample.is_scene]
    pairs: dict[str, list[ImagePair]] = {"look-up": [], "dense": []}
    for _ in range(50 * count):
        if len(pairs["look-up"]) == count or len(scenes) < 2:
            break
        first, second = (scenes[index] for index in generator.choice(len(scenes), 2, replace=False))
        shared = [cell for cell in first.content if cell in second.content]
        if not shared:
            continue
        cell, task = shared[generator.integers(len(shared))], ("colour", "shape")[generator.integers(2)]
        question = first.cell_question(task, cell).text
        pairs["look-up"].append(ImagePair(question, first.image, second.image))
        pairs["dense"].append(ImagePair(first.dense_question().text, first.image, second.image))
    if not pairs["look-up"]:
        raise ValueError(f"No two of {len(scenes)} held-out scenes fill the same cell; a lab needs more of them.")
    return pairs


@torch.no_grad()
def score_from_texts(folder: Path, settings: Settings, questions: Questions) -> dict[str, float]:
    """What the language model alone scores when it reads the description in place of the visual tokens: a ceiling.

    Args:
        folder: of the language model.
        settings: for the held-out images.
        questions: per task, as every cell is asked.
    """
    tokenizer = build_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples, _ = held_out_questions(settings)
    scores = {}
    for task, asked in questions.items():
        texts = [f"{tokenizer.bos_token} {samples[n].description()} {question.text}" for n, question in asked]
        found: list[float] = []
        for start in range(0, len(texts), 64):
            part = slice(start, start + 64)
            inputs = tokenizer(texts[part], padding=True, add_special_tokens=False, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            longest = 52 if task in world.DENSE_TASKS else 3
            output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [
                world.score(task, answer.strip(), question.answer)
                for answer, (_, question) in zip(answers, asked[part], strict=True)
            ]
        scores[task] = summarize(task, 0, found).score
    return scores

"""Evaluate a trained model at every m, save one variant per m, load each back and ask it."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from fusedvlm.console import progress
from fusedvlm.evaluation import EvaluationResults, answer_questions, describe_environment, measure_latencies, summarize
from fusedvlm.files import write_atomically, write_json
from fusedvlm.scaling import Curve, PowerLawFit, ScoreRecord, fit_curve
from fusedvlm.scaling.tradeoff.calibrate import FAMILY_FILE, asked_lines

from . import world
from .settings import Settings

if TYPE_CHECKING:
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
    from fusedvlm.processing import FusedVLMProcessor

if TYPE_CHECKING:
    from .compare import Comparison

HELD_OUT_WORLD = 1_000_000  # index offset of held-out images
MEASURED = "measured"  # folder of results beside those of the variants: other m, second turns, other recipes


@dataclass(frozen=True)
class SecondTurn:
    """Score of one-word questions asked second, the first one answered rightly.

    Args:
        after: kind of the first question, "one_word" or "dense".
        num_visual_tokens, num_followup_visual_tokens: m of the first question, m' of the second.
    """

    after: str
    num_visual_tokens: int
    num_followup_visual_tokens: int
    task: str
    score: float
    count: int
    standard_error: float


@dataclass
class Family:
    """What one run produced."""

    folder: Path
    results: EvaluationResults
    swapped: EvaluationResults
    fit: PowerLawFit | None
    examples: list[dict] = field(default_factory=list)
    stages: dict = field(default_factory=dict)
    between: EvaluationResults | None = None
    second_turns: list[SecondTurn] = field(default_factory=list)
    comparison: "Comparison | None" = None

    @property
    def verdict(self) -> str:
        """Which laws the standard errors of the mean over tasks leave standing, in words."""
        points = []
        for m, score in self.mean_scores().items():
            errors = [row.standard_error or 0.0 for row in self.results.scores if row.num_visual_tokens == m]
            error = float(np.sqrt(np.sum(np.square(errors)))) / len(errors)
            points.append(ScoreRecord("mean", "score", m, score, standard_error=error or None))
        return fit_curve(Curve("mean", "score", (), tuple(points)), resamples=20).verdict

    def mean_scores(self, swapped: bool = False) -> dict[int, float]:
        """Mean over tasks at each m."""
        scores = (self.swapped if swapped else self.results).scores
        counts = sorted({score.num_visual_tokens for score in scores})
        return {m: float(np.mean([s.score for s in scores if s.num_visual_tokens == m])) for m in counts}

    def variant_folder(self) -> Path:
        """Folder of the variant with the largest m."""
        return self.folder / f"fusedvlm-m{max(self.mean_scores())}"


def first_held_out(settings: Settings) -> int:
    """Index of the first held-out image; training images count from 0."""
    return HELD_OUT_WORLD + settings.seed * settings.num_held_out


def held_out_questions(settings: Settings) -> tuple[list[world.Sample], dict[str, list[tuple[int, world.Question]]]]:
    """Held-out images, and per task questions as (image number, question)."""
    first = first_held_out(settings)
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


Questions = dict[str, list[tuple[int, world.Question]]]


def evaluate(
    model: Any,
    processor: Any,
    settings: Settings,
    questions: Questions,
    features: torch.Tensor,
    command: str,
    swapped: bool,
    counts: Sequence[int] | None = None,
) -> EvaluationResults:
    """Score every task at every m by free decoding; swapped images come from the next question of the same task."""
    results = EvaluationResults(describe_environment(command))
    counts = settings.num_visual_tokens if counts is None else counts
    total = len(counts) * sum(len(asked) for asked in questions.values())
    name = "evaluation, images swapped" if swapped else "evaluation"
    with contextlib.closing(progress(total=total, description=name)) as bar:
        for m in counts:
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
                results.scores.append(summarize(task, m, scores))
                results.question_scores.setdefault(task, {})[m] = scores
    return results


def save_question_scores(folder: Path, questions: Questions, results: EvaluationResults) -> None:
    """What every question scored at each m, for `fusedvlm scaling calibrate`."""
    rows = [
        {"task": task, "question": question.text, "scores": {m: by_m[number] for m, by_m in kept.items()}}
        for task, kept in results.question_scores.items()
        for number, (_, question) in enumerate(questions[task])
    ]
    write_atomically(folder / FAMILY_FILE, asked_lines(rows))


def evaluate_second_turns(
    model: Any, processor: Any, settings: Settings, questions: Questions, samples: list, features: torch.Tensor
) -> list[SecondTurn]:
    """One-word questions behind another one, and behind the dense one, at every m' that is served."""
    largest, one_word = settings.max_num_visual_tokens, [task for task in questions if task not in world.DENSE_TASKS]
    pairs = [
        (after, m, followup)
        for followup in settings.followups
        for after, m in {("one_word", followup): 0, ("one_word", largest): 0, ("dense", largest): 0}
        if followup <= m
    ]
    asked = {task: questions[task][: settings.second_turn_questions] for task in one_word}
    generator = np.random.default_rng([settings.seed, 5])
    firsts = {
        task: [another_question(samples[number], question, generator) for number, question in asked[task]]
        for task in one_word
    }
    turns = []
    total = len(pairs) * sum(map(len, asked.values()))
    with contextlib.closing(progress(total=total, description="evaluation, second turns")) as bar:
        for after, m, followup in pairs:
            for task in one_word:
                numbers = [number for number, _ in asked[task]]
                before = firsts[task] if after == "one_word" else [samples[n].dense_question() for n in numbers]
                answers = answer_questions(
                    model,
                    processor,
                    [question.text for _, question in asked[task]],
                    m,
                    view_features=features[torch.tensor(numbers)],
                    max_new_tokens=3,
                    batch_size=128,
                    on_batch=bar.update,
                    histories=[[(first.text, first.answer)] for first in before],
                    num_followup_visual_tokens=followup,
                )
                scores = [world.score(task, a, q.answer) for a, (_, q) in zip(answers, asked[task], strict=True)]
                mean = summarize(task, m, scores)
                turns.append(SecondTurn(after, m, followup, task, mean.score, mean.count, mean.standard_error or 0.0))
    return turns


def another_question(sample: world.Sample, question: world.Question, generator: np.random.Generator) -> world.Question:
    """A one-word question about the image that is not this one; this one where the image has no other."""
    drawn = sample.draw_questions(generator, 2, dense=False)
    return next((one for one in drawn if one.text != question.text), question)


def save_family(
    settings: Settings, model: "FusedVLMForConditionalGeneration", processor: "FusedVLMProcessor", folder: Path
) -> list[Path]:
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
    examples: list[dict[str, Any]] = [
        {"question": q.text, "expected": q.answer, "task": q.task, "sample": s, "answers": {}}
        for s, qs in asked
        for q in qs
    ]
    for folder in progress(folders, description="loading variants back"):
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        m = model.config.num_visual_tokens
        for example in examples:
            answer = answer_questions(
                model, processor, [example["question"]], m, images=[example["sample"].image], max_new_tokens=52
            )[0]
            example["answers"][m] = answer
    # The last one loaded has the largest m, and so answers at every m.
    counts = sorted(examples[0]["answers"])
    return examples, measure_latencies(model, processor, shown[0].image, examples[0]["question"], counts)


def save_example(examples: list[dict], folder: Path) -> None:
    """Leave a picture with real answers for the cards: the first question that the variants answer differently."""
    if not examples:
        return
    chosen = next((example for example in examples if len(set(example["answers"].values())) > 1), examples[0])
    chosen["sample"].image.save(folder / "example.png")
    document = {
        "image": "example.png",
        "question": chosen["question"],
        "expected": chosen["expected"],
        "answers": {str(m): text for m, text in chosen["answers"].items()},
    }
    write_json(folder / "example.json", document)


def save_record(family: Family, settings: Settings) -> None:
    """Write results.json, swapped.json, run.json and example.json beside the variants."""
    save_example(family.examples, family.folder)
    family.results.save(family.folder / "results.json")
    family.swapped.save(family.folder / "swapped.json")
    measured = family.folder / MEASURED
    measured.mkdir(exist_ok=True)
    if family.between is not None:
        family.between.save(measured / "between.json")
    write_json(measured / "second_turns.json", [asdict(turn) for turn in family.second_turns])
    environment = family.results.environment
    record = {
        "command": environment.command,
        "versions": environment.versions,
        "settings": {**asdict(settings), "groups": dict(settings.groups), "dense_counts": settings.dense_counts},
        "data": {
            "source": "rendered by fusedvlm.quickstart.world from seed and index",
            "seed": settings.seed,
            "training_images": [0, settings.num_images],
            "held_out_images": [first_held_out(settings), first_held_out(settings) + settings.num_held_out],
        },
        "stages": family.stages,
        "mean_score": family.mean_scores(),
        "mean_score_swapped": family.mean_scores(swapped=True),
        "second_turns": [asdict(turn) for turn in family.second_turns],
        "fit": None if family.fit is None else asdict(family.fit),
        "examples": [{k: v for k, v in example.items() if k != "sample"} for example in family.examples],
    }
    write_json(family.folder / "run.json", record)

"""A folder of variants of several language models with their results, as a grid of scores over LLM size and m."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fusedvlm.costs.counts import Flops, Shapes, count_flops, read_shapes
from fusedvlm.evaluation import EvaluationResults, TaskScore
from fusedvlm.files import read_json
from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.quickstart.world import DENSE_TASKS, TASKS
from fusedvlm.scaling.divergence.estimators import DivergenceResult

FAMILY_TITLES = {True: "with the question", False: "without the question"}
WORLD_KINDS = {"look-up": tuple(task for task in TASKS if task not in DENSE_TASKS), "dense": DENSE_TASKS}
NOT_VARIANTS = ("stage1", "stage2", "measured", "llm", "llms")  # folders of a run that hold no finished variant


@dataclass(frozen=True)
class GridVariant:
    """One set of weights: its language model's size, whether fusion reads the question, its scores at every m."""

    name: str
    reads_question: bool
    llm_parameters: int
    results: EvaluationResults
    shapes: Shapes
    num_views: int
    divergences: Mapping[str, DivergenceResult] = field(default_factory=dict)
    training: Mapping | None = None
    text_scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """The m it was measured at."""
        return sorted({score.num_visual_tokens for score in self.results.scores})

    def flops(self, num_visual_tokens: int, text_tokens: int, question_tokens: int) -> Flops:
        """Of one question, for an image that fills its views."""
        return count_flops(self.shapes, num_visual_tokens, self.num_views, text_tokens, question_tokens)


@dataclass(frozen=True)
class Cell:
    """A score of a kind of question at one LLM size and m, with its standard error over questions.

    Both are those of one half success and one half failure more (Jeffreys): from a sample nothing is known exactly, and
    an error of zero has no logarithm.
    """

    variant: str
    llm_parameters: int
    num_visual_tokens: int
    score: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Grid:
    """Variants of several language models, and what was left out."""

    variants: tuple[GridVariant, ...]
    kinds: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()

    @property
    def families(self) -> list[bool]:
        """With the question first."""
        return sorted({variant.reads_question for variant in self.variants}, reverse=True)

    def of(self, reads_question: bool) -> list[GridVariant]:
        """Variants of a family, the smallest language model first."""
        return sorted(
            (variant for variant in self.variants if variant.reads_question == reads_question),
            key=lambda variant: (variant.llm_parameters, variant.name),
        )

    def cells(self, reads_question: bool, kind: str) -> list[Cell]:
        """Cells of a family and kind of question, over all its tasks that the variants share."""
        return [
            cell
            for variant in self.of(reads_question)
            for m in variant.counts
            if (cell := _cell(variant, m, self.kinds[kind])) is not None
        ]


def _cell(variant: GridVariant, m: int, tasks: Sequence[str]) -> Cell | None:
    """None where a task is missing: means over different tasks do not compare."""
    scores = {score.task: score for score in variant.results.scores if score.num_visual_tokens == m}
    if not set(tasks) <= scores.keys():
        return None
    found = [smoothed(scores[task]) for task in tasks]
    return Cell(
        variant.name,
        variant.llm_parameters,
        m,
        float(np.mean([mean for mean, _ in found])),
        float(np.sqrt(sum(error**2 for _, error in found))) / len(found),
        sum(scores[task].count for task in tasks),
    )


def smoothed(score: TaskScore) -> tuple[float, float]:
    """Mean and standard error with half a success and half a failure more.

    Where no error is stated, it is the largest that a mean of scores between 0 and 1 can have.

    Raises:
        ValueError: for a score outside [0, 1], which has no error 1 - score.
    """
    n, mean = score.count, score.score
    if not 0 <= mean <= 1 or n < 1:
        raise ValueError(
            f"{score.task} at m={score.num_visual_tokens}: score {mean:g} of {n} questions is not between 0 and 1; "
            'state its scale in the results ("0..100").'
        )
    center = (mean * n + 0.5) / (n + 1)
    error = (mean * (1 - mean) / max(n - 1, 1)) ** 0.5 if score.standard_error is None else score.standard_error
    squares = error**2 * n * (n - 1) + n * (mean - center) ** 2
    squares += 0.5 * (1 - center) ** 2 + 0.5 * center**2
    return center, float(np.sqrt(squares)) / (n + 1)


def read_grid_folder(folder: str | Path, kinds: Mapping[str, Sequence[str]] | None = None) -> Grid:
    """Every variant in a folder or below it that has results in it, or in the family folder around it.

    Args:
        folder: of variants of several language models.
        kinds: {kind of question: its tasks}; by default the quickstart's look-up and dense tasks, else each task alone.

    Raises:
        ValueError: when there are no variants with results, a file is damaged, or a kind names an unknown task.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with variants of several language models and their results.")
    variants, left_out = [], []
    for path in sorted(folder.rglob("results.json")):
        where = path.parent.relative_to(folder)
        if set(where.parts) & set(NOT_VARIANTS) or any(
            part.startswith(".") or "partial" in part for part in where.parts
        ):
            continue
        variant = _variant_of(path)
        if variant is None:
            left_out.append(f"{where}: results, and no variant beside them (config.json of a FusedVLM)")
            continue
        read = _read_variant(path, variant, str(where) if where.parts else folder.name)
        unbounded = sorted({row.label for row in read.results.scores if row.maximum is None})
        left_out += [f"{read.name}, {label}: a score without an upper bound has no error" for label in unbounded]
        variants.append(replace(read, results=replace(read.results, scores=_on_unit_scale(read.results.scores))))
    if not variants:
        raise ValueError(
            f"{folder}: no variant with results.json in it; evaluate variants of several language models first, or "
            "leave the folder out to train a grid."
        )
    tasks = list(dict.fromkeys(s.task for variant in variants for s in variant.results.scores))
    return Grid(tuple(variants), choose_kinds(tasks, kinds), tuple(left_out))


def _on_unit_scale(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """One score per task, the primary ones, on a scale from 0 to 1, named by their labels."""
    return [
        TaskScore(
            row.label,
            row.num_visual_tokens,
            row.score / row.maximum,
            row.count,
            None if row.standard_error is None else row.standard_error / row.maximum,
        )
        for row in scores
        if row.is_primary and row.maximum is not None
    ]


def choose_kinds(tasks: Sequence[str], kinds: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """{kind: tasks}: those given, else the quickstart's where they are its tasks, else each task alone.

    Raises:
        ValueError: naming a task that nobody was scored on.
    """
    if kinds:
        for kind, wanted in kinds.items():
            if unknown := sorted(set(wanted) - set(tasks)):
                raise ValueError(
                    f"Kind {kind}: nobody was scored on {', '.join(unknown)}; tasks are {', '.join(tasks)}."
                )
        return {kind: tuple(wanted) for kind, wanted in kinds.items()}
    if set(tasks) == set(TASKS):
        return {kind: tuple(named) for kind, named in WORLD_KINDS.items()}
    return {task: (task,) for task in tasks}


def parse_kinds(rules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """ "look-up=colour,shape" to {"look-up": ("colour", "shape")}.

    Raises:
        ValueError: for anything else.
    """
    kinds = {}
    for rule in rules:
        kind, equals, tasks = rule.partition("=")
        named = tuple(task.strip() for task in tasks.split(",") if task.strip())
        if not equals or not kind.strip() or not named:
            raise ValueError(f"--kind {rule!r}: write NAME=task,task, as in look-up=colour,shape,letter.")
        if kind.strip() in kinds:
            raise ValueError(f"--kind {kind.strip()} is stated twice; name all its tasks at once.")
        kinds[kind.strip()] = named
    return kinds


def _variant_of(results: Path) -> Path | None:
    """The variant that results are about: their own folder, else the one with the largest m of the family in it."""
    candidates = [
        results.parent,
        *(p for p in sorted(results.parent.iterdir()) if p.is_dir() and p.name not in NOT_VARIANTS),
    ]
    found = [(folder, fields) for folder in candidates if (fields := _fields(folder)) is not None]
    if found and found[0][0] == results.parent:
        return results.parent
    return max(found, key=lambda pair: pair[1].get("num_visual_tokens") or 0)[0] if found else None


def _fields(folder: Path) -> dict | None:
    path = folder / "config.json"
    if not path.exists():
        return None
    fields = read_json(path)
    return fields if fields.get("model_type") == "fusedvlm" else None


def _read_variant(results: Path, folder: Path, name: str) -> GridVariant:
    config = FusedVLMConfig.from_pretrained(folder)
    shapes = read_shapes(config)
    divergences = results.with_name("divergence.json")
    record = read_json(divergences) if divergences.exists() else {}
    lab = results.with_name("lab.json")
    loaded = EvaluationResults.load(results)
    if not loaded.scores:
        raise ValueError(f"{results} has no scores.")
    return GridVariant(
        name=name,
        reads_question=bool(config.fuse_question),
        llm_parameters=shapes.parameters["llm"],
        results=loaded,
        shapes=shapes,
        num_views=1 + config.max_local_views,
        divergences={kind: DivergenceResult.from_record(one) for kind, one in record.items()},
        training=read_json(lab) if lab.exists() else None,
        text_scores=_text_scores(results),
    )


def _text_scores(results: Path) -> dict[str, float]:
    """What the language model alone scores from texts, where a lab measured it."""
    lab = results.with_name("lab.json")
    if not lab.exists():
        return {}
    width = json.loads(lab.read_text(encoding="utf-8"))["training"]["llm_width"]
    path = results.parents[2] / "llms" / f"llm{width}" / "text_scores.json"
    return read_json(path) if path.exists() else {}

"""Cells to points with intervals: resampled questions and seeds, and paired differences from one entrant."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from fusedvlm.costs.counts import count_flops, read_shapes
from fusedvlm.evaluation import EvaluationResults
from fusedvlm.modeling_fusedvlm import FusedVLMConfig

from .cells import DENSE, ONE_WORD, Cell

GROUPS = {"score": (*ONE_WORD, *DENSE), "one-word": ONE_WORD, "dense": DENSE}
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One entrant at one m, over all its seeds; what was not measured is None.

    `difference` is from the reference entrant at the same m, over the same questions and seeds.
    """

    entrant: str
    num_visual_tokens: int
    scores: dict[str, Interval]
    difference: Interval | None = None
    llm_flops: float | None = None
    total_flops: float | None = None
    latency_ms: Interval | None = None
    trained_parameters: int | None = None
    training_tflops: float | None = None
    training_steps: int | None = None
    seeds: int = 1
    questions: int = 0


@dataclass(frozen=True)
class Summary:
    """What the page and `--json` show."""

    points: list[Point]
    reference: str | None
    verdicts: list[str]
    notes: list[str] = field(default_factory=list)
    environments: list[dict] = field(default_factory=list)

    def document(self) -> dict:
        """JSON-ready."""
        return asdict(self)


def resampled_means(scores: Mapping[str, np.ndarray], generator_seed: int = 0) -> np.ndarray:
    """(resamples,) means over tasks, each with seeds and questions drawn again.

    The draws depend on the numbers of tasks, seeds and questions only, so that two entrants that answered the same
    questions are resampled together, and their difference can be taken draw by draw.

    Args:
        scores: per task (seeds, questions).
    """
    parts = []
    for task, values in scores.items():
        seeds, questions = values.shape
        seed_weights = _weights("seeds", seeds, generator_seed)
        question_weights = _weights(task, questions, generator_seed)
        parts.append(((question_weights @ values.T) * seed_weights).sum(1) / (seeds * questions))
    return np.mean(parts, axis=0)


@lru_cache(maxsize=64)
def _weights(name: str, count: int, seed: int) -> np.ndarray:
    """(resamples, count) how often each of `count` things is drawn, with replacement."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.multinomial(count, [1 / count] * count, RESAMPLES).astype(float)


def interval(mean: float, draws: np.ndarray) -> Interval:
    """95 % percentile interval."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(mean), float(low), float(high))


def summarize_cells(cells: Sequence[Cell], reference: str | None = None) -> list[Point]:
    """Points of finished cells, in the order in which entrants first appear, then by m.

    Args:
        cells: of any entrants, m and seeds.
        reference: key of the entrant that differences are taken from.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        groups.setdefault((cell.entrant, cell.num_visual_tokens), []).append(cell)
    order = list(dict.fromkeys(cell.entrant for cell in cells))
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    return [
        _point(groups[key], None if reference is None or key[0] == reference else groups.get((reference, key[1])))
        for key in keys
    ]


def _matrix(cells: Sequence[Cell], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    return {
        task: np.array([cell.scores[task] for cell in cells], dtype=float) for task in tasks if task in cells[0].scores
    }


def _point(cells: list[Cell], others: list[Cell] | None) -> Point:
    first = cells[0]
    scores = {}
    for name, tasks in {**GROUPS, **{task: (task,) for task in GROUPS["score"]}}.items():
        values = _matrix(cells, tasks)
        scores[name] = interval(np.mean([v.mean() for v in values.values()]), resampled_means(values))
    seeds = [cell.seed for cell in cells]
    shared = [cell for cell in others or () if cell.seed in seeds]
    difference = None
    if shared:
        ours = _matrix([cell for cell in cells if cell.seed in {other.seed for other in shared}], GROUPS["score"])
        theirs = _matrix(shared, GROUPS["score"])
        draws = resampled_means(ours) - resampled_means(theirs)
        mean = np.mean([ours[task].mean() - theirs[task].mean() for task in ours])
        difference = interval(mean, draws)
    latency = [cell.latency_ms for cell in cells]
    return Point(
        entrant=first.entrant,
        num_visual_tokens=first.num_visual_tokens,
        scores=scores,
        difference=difference,
        llm_flops=first.flops["llm"],
        total_flops=first.total_flops,
        latency_ms=Interval(*(float(np.median([one[name] for one in latency])) for name in ("median", "low", "high"))),
        trained_parameters=int(first.training["trained_parameters"]),
        training_tflops=float(np.mean([cell.training["tflops"] for cell in cells])),
        training_steps=round(float(np.mean([cell.training["steps"] for cell in cells]))),
        seeds=len(cells),
        questions=sum(len(values) for values in first.scores.values()),
    )


def read_given(path: str | Path) -> list[Point]:
    """Points of a variant or of an evaluation: a results.json, or a folder that has one, or lies in a family that has.

    Scores are means over the tasks of the file, intervals 1.96 standard errors; FLOPs are counted from the variant's
    configuration where there is one, else missing.

    Raises:
        ValueError: when there are no results, or the file is none.
    """
    path = Path(path)
    variant = (
        path if (path / "config.json").exists() else path.parent if (path.parent / "config.json").exists() else None
    )
    candidates = [path] if path.is_file() else [path / "results.json", path.parent / "results.json"]
    file = next((one for one in candidates if one.is_file()), None)
    if file is None:
        raise ValueError(f"{path}: no results.json in it or beside it; evaluate the variant first, or name the file.")
    results = EvaluationResults.load(file)
    by_m: dict[int, list] = {}
    own = [row for row in results.scores if not row.harness]
    for score in own or [row for row in results.scores if row.is_primary and row.maximum is not None]:
        by_m.setdefault(score.num_visual_tokens, []).append(score)
    if not by_m:
        raise ValueError(f"{file} has no scores.")
    if variant is not None and path.is_dir() and file.parent != path:  # one variant of a family: its own m only
        own = json.loads((path / "config.json").read_text(encoding="utf-8")).get("num_visual_tokens")
        by_m = {m: rows for m, rows in by_m.items() if m == own} or by_m
    name = path.name if path.is_dir() else f"{path.parent.name}/{path.name}"
    latencies = {row.num_visual_tokens: 1e3 * row.time_to_first_token for row in results.latencies}
    costs = _counted(variant, list(by_m)) if variant is not None else {}
    points = []
    for m, rows in sorted(by_m.items()):
        mean = float(np.mean([row.score for row in rows]))
        error = 1.96 * float(np.sqrt(sum((row.standard_error or 0.0) ** 2 for row in rows))) / len(rows)
        scores = {"score": Interval(mean, mean - error, mean + error)}
        for row in rows:
            half = 1.96 * (row.standard_error or 0.0)
            scores[row.label] = Interval(row.score, row.score - half, row.score + half)
        seconds = latencies.get(m)
        latency = None if seconds is None else Interval(seconds, seconds, seconds)
        points.append(
            Point(name, m, scores, questions=sum(row.count for row in rows), latency_ms=latency, **costs.get(m, {}))
        )
    return points


def _counted(variant: Path, counts: list[int]) -> dict[int, dict]:
    """FLOPs of one question at each m, from a variant's configuration, for an image that fills its views."""
    config = FusedVLMConfig.from_pretrained(variant)
    shapes, views = read_shapes(config), 1 + config.max_local_views
    found = {}
    for m in counts:
        flops = count_flops(shapes, m, num_views=views)
        found[m] = {"llm_flops": flops.prefill, "total_flops": flops.first_token}
    return found


def check_same_tasks(points: Sequence[Point]) -> None:
    """Raise `ValueError` when means over different tasks would stand side by side."""
    tasks = {point.entrant: tuple(sorted(set(point.scores) - set(GROUPS))) for point in points}
    if len(set(tasks.values())) > 1:
        (one, ours), (other, theirs) = next(
            ((a, ta), (b, tb)) for a, ta in tasks.items() for b, tb in tasks.items() if ta != tb
        )
        raise ValueError(
            f"{one} was scored on {', '.join(ours)}, {other} on {', '.join(theirs)}: their means cannot stand side by "
            "side. Compare results over the same tasks."
        )


def verdicts(points: Sequence[Point], reference: str | None) -> list[str]:
    """Who leads at each m and who cannot be told from the leader, in sentences; then where the reference loses."""
    lines = [
        _leader(m, [point for point in points if point.num_visual_tokens == m])
        for m in sorted({point.num_visual_tokens for point in points})
    ]
    if reference is None:
        return lines
    losses = [(p, p.difference) for p in points if p.difference is not None and p.difference.low > 0]
    for p, behind in losses:
        lines.append(
            f"{reference} loses to {p.entrant} at m = {p.num_visual_tokens}, by {behind.mean:.3f} "
            f"[{behind.low:.3f}, {behind.high:.3f}]."
        )
    if not losses and any(p.difference is not None for p in points):
        lines.append(f"Nobody beats {reference} at the same m by more than the interval of the difference.")
    return lines


def _leader(m: int, points: list[Point]) -> str:
    ranked = sorted(points, key=lambda point: -point.scores["score"].mean)
    best, last = ranked[0].scores["score"], ranked[-1]
    line = f"m = {m}: {ranked[0].entrant} leads with {best.mean:.3f} [{best.low:.3f}, {best.high:.3f}]"
    if len(ranked) == 1:
        return f"{line}, alone."
    tied = [point.entrant for point in ranked[1:] if point.scores["score"].high >= best.low]
    line += f"; the intervals of {', '.join(tied)} overlap it" if tied else "; no other interval overlaps it"
    return f"{line}; last is {last.entrant} with {last.scores['score'].mean:.3f}."

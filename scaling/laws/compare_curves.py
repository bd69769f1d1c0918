"""Comparisons of whole curves: with and without the question, groups of similar shape, models against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.cluster.vq import kmeans2

from fusedvlm.files import read_table
from fusedvlm.scaling.score_records import Curve


@dataclass(frozen=True)
class InputEffect:
    """Relative difference of scores between two kinds of input at every common m, in per cent of the second kind."""

    benchmark: str
    metric: str
    m: tuple[int, ...]
    per_cent: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over m."""
        return float(np.mean(self.per_cent))


@dataclass(frozen=True)
class CurveClusters:
    """Min-max normalized curves (curves, m) on the common m, with the number of each one's cluster, 0 the largest."""

    names: tuple[str, ...]
    m: tuple[int, ...]
    normalized: np.ndarray
    labels: np.ndarray

    def members(self, cluster: int) -> list[str]:
        """Names in one cluster."""
        return [name for name, label in zip(self.names, self.labels, strict=True) if label == cluster]


@dataclass(frozen=True)
class ModelScore:
    """Score of one model on one benchmark."""

    model: str
    benchmark: str
    score: float


def input_effects(curves: Sequence[Curve], column: str, first: str, second: str) -> list[InputEffect]:
    """(first - second) / second of every benchmark and metric measured with both, largest mean first.

    Args:
        curves: from `group_curves`.
        column: the grouping column, `fusion_inputs` in the paper's scores.
        first, second: its values to compare.

    Raises:
        ValueError: when no benchmark has both.
    """
    sides: dict[tuple, dict[str, Curve]] = {}
    for curve in curves:
        sides.setdefault((curve.benchmark, curve.metric), {})[dict(curve.groups).get(column, "")] = curve
    effects = [_effect(pair[first], pair[second]) for pair in sides.values() if first in pair and second in pair]
    if not effects:
        values = sorted({dict(curve.groups).get(column, "") for curve in curves})
        raise ValueError(f"No benchmark has both {column}={first!r} and {second!r}; its values are {values}.")
    return sorted(effects, key=lambda effect: -effect.mean)


def cluster_curves(curves: Sequence[Curve], clusters: int = 4, seed: int = 0) -> CurveClusters:
    """K-means groups of min-max normalized curves, as the paper groups its benchmarks; clusters ordered by size.

    Only m that all curves have are used; a constant curve is normalized to 0.5.

    Raises:
        ValueError: fewer curves than clusters, or fewer than two common m.
    """
    common = sorted(set.intersection(*(set(curve.m) for curve in curves))) if curves else []
    if len(curves) < clusters or len(common) < 2:
        raise ValueError(f"{len(curves)} curves with {len(common)} common m; {clusters} clusters need as many curves.")
    rows = np.array([[dict(zip(c.m, c.scores, strict=True))[m] for m in common] for c in curves])
    low, spread = rows.min(1, keepdims=True), np.ptp(rows, axis=1, keepdims=True)
    normalized = np.where(spread > 0, (rows - low) / np.where(spread > 0, spread, 1), 0.5)
    _, labels = kmeans2(normalized, clusters, minit="++", seed=np.random.default_rng(seed), iter=100)
    order = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    rank = np.empty(clusters, dtype=int)
    rank[order] = np.arange(clusters)
    return CurveClusters(tuple(curve.name for curve in curves), tuple(common), normalized, rank[labels])


def read_models(source: str | Path) -> list[ModelScore]:
    """Scores of several models: CSV with columns model, benchmark, score; "#" starts a comment.

    Raises:
        ValueError: naming the row, for missing columns, numbers that are none, and duplicates.
    """
    records: dict[tuple[str, str], ModelScore] = {}
    for place, row in read_table(source, ("model", "benchmark", "score")):
        key = (row["model"], row["benchmark"])
        if key in records:
            raise ValueError(f"{source}, {place}: duplicate of {key[0]} on {key[1]}.")
        try:
            records[key] = ModelScore(*key, float(row["score"]))
        except ValueError:
            raise ValueError(f"{source}, {place}: score is {row['score']!r}, not a number.") from None
    return [*records.values()]


def _effect(first: Curve, second: Curve) -> InputEffect:
    ours, theirs = dict(zip(first.m, first.scores, strict=True)), dict(zip(second.m, second.scores, strict=True))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError(f"{first.name} and {second.name} have no m in common.")
    return InputEffect(
        first.benchmark,
        first.metric,
        tuple(common),
        tuple(100 * (ours[m] - theirs[m]) / theirs[m] for m in common),
    )

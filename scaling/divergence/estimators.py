"""Divergence of two branches and their dependency measures, from hidden states ("Scaling Capability in Token Space").

For states h_i^A, h_i^B (N, d) of the differing positions: D(n) = ||sum_{i<=n} (h_i^A - h_i^B)||, and the mean cosines
psi_eq, psi_aa, psi_bb, psi_ab (docs/theory.md, "Dependency measures"). All n at once cost O(N d): running sums, no
N x N matrix. Everything is accumulated in float64, whatever the model's dtype.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np

from .theory import alpha_from_upsilon, first_without_bound, fit_lambda, upsilon

READINGS = ("mean", "positive_part")
CURVES = ("distance", "psi_eq", "psi_aa", "psi_bb", "psi_ab")
COSINES = ("psi_eq", "psi_aa", "psi_bb", "psi_ab")
BINS = np.linspace(-1, 1, 81)
SAMPLED_POSITIONS = 256  # pairs of positions i != j drawn per pair of branches for the histograms


def pair_curves(states_a: np.ndarray, states_b: np.ndarray) -> dict[str, np.ndarray]:
    """D(n) and psi(n) of one pair of branches for n = 1 ... N, in O(N d) time and O(d) extra memory.

    Args:
        states_a, states_b: (N, d), any float dtype numpy knows.

    Returns:
        Arrays of length N named as in `CURVES`. Cross measures at n = 1 have no pair of positions; they are 0 there.

    Raises:
        ValueError: different shapes, or a state that is zero or not finite.
    """
    a, b = _check_states(states_a, states_b)
    count, width = a.shape
    sum_u, sum_v, sum_diff, u, v = np.zeros((5, width))
    sums = np.empty((5, count))
    for i in range(count):
        u[:], v[:] = a[i], b[i]
        sum_diff += u
        sum_diff -= v
        u *= 1 / _norm(u, i, "A")
        v *= 1 / _norm(v, i, "B")
        sum_u += u
        sum_v += v
        sums[:, i] = sum_diff @ sum_diff, u @ v, sum_u @ sum_u, sum_v @ sum_v, sum_u @ sum_v
    n = np.arange(1, count + 1)
    same = np.cumsum(sums[1])
    others = np.maximum(n * (n - 1), 1)
    cross = np.stack([sums[2] - n, sums[3] - n, sums[4] - same]) / others
    cross[:, 0] = 0.0
    return dict(zip(CURVES, [np.sqrt(sums[0]), same / n, *cross], strict=True))


@dataclass
class DivergenceStatistics:
    """Running sums over pairs, for n = 1 ... max_tokens; adding up two of them is the statistics of both.

    `moments` holds sum and sum of squares of every curve (2, 5, max_tokens), `count` the pairs with at least n tokens,
    `histograms` counts of cosines in `BINS`. `worst` holds the largest cosine seen at every pair of positions
    (3, max_tokens, max_tokens) for AA, BB, AB, kept only for the "positive_part" reading (paper, Definition 1).
    """

    max_tokens: int
    reading: str = "mean"
    count: np.ndarray = field(default=cast("np.ndarray", None))  # None: zeros of the right shapes
    moments: np.ndarray = field(default=cast("np.ndarray", None))
    histograms: np.ndarray = field(default=cast("np.ndarray", None))
    worst: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"Unknown reading {self.reading!r}; readings are {', '.join(READINGS)}.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}; a branch has at least one token.")
        if self.count is None:
            self.count = np.zeros(self.max_tokens, dtype=np.int64)
            self.moments = np.zeros((2, len(CURVES), self.max_tokens))
            self.histograms = np.zeros((len(COSINES), len(BINS) - 1), dtype=np.int64)
            if self.reading == "positive_part":
                self.worst = np.full((3, self.max_tokens, self.max_tokens), -np.inf)

    def add(self, states_a: np.ndarray, states_b: np.ndarray, seed: int = 0) -> None:
        """Add one pair of branches, (N, d) each; positions after max_tokens are not read.

        Args:
            seed: of the positions whose cosines enter the histograms, for instance the pair's number.

        Raises:
            ValueError: see `pair_curves`.
        """
        a, b = states_a[: self.max_tokens], states_b[: self.max_tokens]
        curves = np.stack([*pair_curves(a, b).values()])
        length = curves.shape[1]
        self.count[:length] += 1
        self.moments[0, :, :length] += curves
        self.moments[1, :, :length] += curves**2
        self._add_cosines(_unit_rows(a), _unit_rows(b), np.random.default_rng([seed, length]))

    def merge(self, other: "DivergenceStatistics") -> None:
        """Add the statistics of other pairs."""
        if (self.max_tokens, self.reading) != (other.max_tokens, other.reading):
            raise ValueError("Statistics of different max_tokens or reading do not add up.")
        self.count += other.count
        self.moments += other.moments
        self.histograms += other.histograms
        if self.worst is not None and other.worst is not None:
            np.maximum(self.worst, other.worst, out=self.worst)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything accumulated, for saving."""
        named = {"count": self.count, "moments": self.moments, "histograms": self.histograms}
        return named if self.worst is None else {**named, "worst": self.worst}

    def _add_cosines(self, u: np.ndarray, v: np.ndarray, generator: np.random.Generator) -> None:
        length = len(u)
        samples = [(u * v).sum(1)]
        if length > 1:
            i = generator.integers(0, length, SAMPLED_POSITIONS)
            j = (i + generator.integers(1, length, SAMPLED_POSITIONS)) % length
            samples += [(x[i] * y[j]).sum(1) for x, y in ((u, u), (v, v), (u, v))]
        for row, sample in zip(self.histograms, samples, strict=False):
            row += np.histogram(np.clip(sample, -1, 1), BINS)[0]
        if self.worst is not None:
            for worst, (x, y) in zip(self.worst, ((u, u), (v, v), (u, v)), strict=True):
                np.maximum(worst[:length, :length], x @ y.T, out=worst[:length, :length])


@dataclass(frozen=True)
class DivergenceResult:
    """Everything measured at n = 1 ... N. Lists; cross measures are None at n = 1, where they do not exist.

    `tokens_with_bound` is the largest N' with Upsilon > 0 for all n <= N'; `lambda_` and `alpha` are fitted and given
    there only. `n_balance` is (1 - psi_eq)/(psi_intra - psi_ab) - 1 at N', None without a positive quadratic part.
    """

    reading: str
    beta: float
    pairs: int
    count: list[int]
    mean_distance: list[float]
    std_distance: list[float]
    psi_eq: list[float]
    psi_aa: list[float | None]
    psi_bb: list[float | None]
    psi_ab: list[float | None]
    psi_intra: list[float | None]
    upsilon: list[float]
    tokens_with_bound: int
    lambda_: float | None
    alpha: list[float]
    n_balance: float | None
    bin_edges: list[float]
    histograms: dict[str, list[int]]

    def record(self) -> dict:
        """JSON-ready, with `kind` for readers and the constant under the name "lambda"."""
        named = asdict(self)
        return {"kind": "divergence", "lambda": named.pop("lambda_"), **named}

    @classmethod
    def from_record(cls, record: dict) -> "DivergenceResult":
        """Back from `record`, ignoring facts about the run added beside it. Raises `ValueError` on missing fields."""
        names = {*cls.__dataclass_fields__} - {"lambda_"}
        if missing := sorted((names | {"lambda"}) - record.keys()):
            raise ValueError(f"Not a divergence record: no {', '.join(missing)}.")
        return cls(lambda_=record["lambda"], **{name: record[name] for name in names})


def summarize(statistics: DivergenceStatistics, beta: float = 1.0, min_pairs: int = 1) -> DivergenceResult:
    """Means over pairs, Upsilon, lambda, n_balance and alpha(n) of everything accumulated.

    Args:
        beta: exponent of performance over divergence, S proportional to E[D]^beta.
        min_pairs: n counts only where at least so many pairs have n tokens.

    Raises:
        ValueError: when no n has `min_pairs` pairs.
    """
    length = int((statistics.count >= min_pairs).sum())
    if length == 0:
        raise ValueError(f"No n has {min_pairs} pairs; {int(statistics.count[0])} pairs were read.")
    count = statistics.count[:length]
    means = dict(zip(CURVES, statistics.moments[0, :, :length] / count, strict=True))
    square = statistics.moments[1, 0, :length] / count
    psi = _worst_case(statistics, length) if statistics.reading == "positive_part" else means
    intra = (psi["psi_aa"] + psi["psi_bb"]) / 2
    bound = upsilon(psi["psi_eq"], intra, psi["psi_ab"])
    first_bad = first_without_bound(bound)
    valid = length if first_bad is None else first_bad - 1
    return DivergenceResult(
        reading=statistics.reading,
        beta=beta,
        pairs=int(statistics.count[0]),
        count=count.tolist(),
        mean_distance=means["distance"].tolist(),
        std_distance=np.sqrt(np.maximum(square - means["distance"] ** 2, 0)).tolist(),
        psi_eq=psi["psi_eq"].tolist(),
        **{name: [None, *psi[name][1:].tolist()] for name in COSINES[1:]},
        psi_intra=[None, *intra[1:].tolist()],
        upsilon=bound.tolist(),
        tokens_with_bound=valid,
        lambda_=fit_lambda(means["distance"][:valid], bound[:valid]) if valid else None,
        alpha=alpha_from_upsilon(bound[:valid], beta).tolist() if valid else [],
        n_balance=_balance(psi["psi_eq"], intra, psi["psi_ab"], valid),
        bin_edges=BINS.tolist(),
        histograms={name: row.tolist() for name, row in zip(COSINES, statistics.histograms, strict=True)},
    )


def _worst_case(statistics: DivergenceStatistics, length: int) -> dict[str, np.ndarray]:
    """Definition 1: at every pair of positions the largest cosine over the data, negatives clipped, then averaged."""
    if statistics.worst is None:
        raise ValueError("The worst case was not kept: measure with reading='positive_part'.")
    worst = np.maximum(statistics.worst[:, :length, :length], 0)
    n = np.arange(1, length + 1)
    corner = worst.cumsum(1).cumsum(2).diagonal(axis1=1, axis2=2)
    same = worst.diagonal(axis1=1, axis2=2).cumsum(1)
    cross = (corner - same) / np.maximum(n * (n - 1), 1)
    return {"psi_eq": same[2] / n, **dict(zip(COSINES[1:], cross, strict=True))}


def _balance(psi_eq: np.ndarray, intra: np.ndarray, psi_ab: np.ndarray, valid: int) -> float | None:
    if valid < 2 or (delta := intra[valid - 1] - psi_ab[valid - 1]) <= 0:
        return None
    return float((1 - psi_eq[valid - 1]) / delta - 1)


def _check_states(states_a: Any, states_b: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(states_a), np.asarray(states_b)
    if a.shape != b.shape or a.ndim != 2 or a.shape[0] == 0:
        raise ValueError(f"States of shapes {a.shape} and {b.shape}; need the same (N, d) with N >= 1.")
    return a, b


def _norm(row: np.ndarray, index: int, branch: str) -> float:
    norm = float(np.sqrt(row @ row))
    if not 0 < norm < np.inf:
        raise ValueError(
            f"State {index} of branch {branch} has norm {norm:g}, so it has no cosine; if the model overflows in half "
            "precision, load it in float32."
        )
    return norm


def _unit_rows(states: np.ndarray) -> np.ndarray:
    states = np.asarray(states, dtype=np.float32)
    return states / np.linalg.norm(states, axis=1, keepdims=True)

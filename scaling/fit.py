"""Fit S(m) = c / m^alpha, the paper's scaling law of performance in the number of visual tokens (section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted S(m) = c / m^alpha.

    `alpha` is negative where scores rise with m. `r2` is the share of the variance of log S explained. Intervals are
    (low, high) percentile intervals of a bootstrap over the points.
    """

    c: float
    alpha: float
    r2: float
    n: int
    c_interval: tuple[float, float]
    alpha_interval: tuple[float, float]
    confidence: float

    def predict(self, num_visual_tokens: Sequence[float]) -> np.ndarray:
        """Fitted scores at the given m."""
        return self.c * np.asarray(num_visual_tokens, dtype=float) ** -self.alpha


def check_points(num_visual_tokens: Sequence[float], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Points as arrays.

    Raises:
        ValueError: naming the point that is not a positive number, or when fewer than two distinct m are left.
    """
    m, score = np.asarray(num_visual_tokens, dtype=float), np.asarray(scores, dtype=float)
    if m.shape != score.shape or m.ndim != 1:
        raise ValueError(f"{m.size} numbers of visual tokens for {score.size} scores.")
    for index, (x, y) in enumerate(zip(m, score, strict=True)):
        if not (np.isfinite(x) and np.isfinite(y) and x > 0 and y > 0):
            raise ValueError(f"Point {index} (m={x:g}, score={y:g}) is not positive; a power law has no place for it.")
    if len(np.unique(m)) < 2:
        raise ValueError(f"A fit needs scores at two or more numbers of visual tokens, got m={sorted(set(m))}.")
    return m, score


def solve(log_m: np.ndarray, log_score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of log S = log c - alpha log m along the last axis; returns (log c, alpha)."""
    centred = log_m - log_m.mean(-1, keepdims=True)
    slope = (centred * log_score).sum(-1) / (centred**2).sum(-1)
    return log_score.mean(-1) - slope * log_m.mean(-1), -slope


def fit_power_law(
    num_visual_tokens: Sequence[float],
    scores: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PowerLawFit:
    """Exact least squares in logs; the same optimum as the paper's BFGS (theory, equation of section 4).

    Args:
        num_visual_tokens, scores: the points, positive numbers.
        confidence: of the bootstrap intervals.
        resamples: bootstrap resamples; those with a single m are redrawn.
        seed: of the bootstrap.

    Raises:
        ValueError: see `check_points`.
    """
    m, score = check_points(num_visual_tokens, scores)
    log_m, log_score = np.log(m), np.log(score)
    log_c, alpha = solve(log_m, log_score)
    residual = log_score - (log_c - alpha * log_m)
    spread = ((log_score - log_score.mean()) ** 2).sum()
    r2 = 1.0 if spread == 0 else float(1 - (residual**2).sum() / spread)
    picks = _resample(len(m), log_m, resamples, np.random.default_rng(seed))
    boot_log_c, boot_alpha = solve(log_m[picks], log_score[picks])
    tail = [50 * (1 - confidence), 50 * (1 + confidence)]
    c_low, c_high = np.exp(np.percentile(boot_log_c, tail))
    alpha_low, alpha_high = np.percentile(boot_alpha, tail)
    return PowerLawFit(
        c=float(np.exp(log_c)),
        alpha=float(alpha),
        r2=r2,
        n=len(m),
        c_interval=(float(c_low), float(c_high)),
        alpha_interval=(float(alpha_low), float(alpha_high)),
        confidence=confidence,
    )


def _resample(count: int, log_m: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(resamples, count) indices with replacement, each row with at least two distinct m."""
    picks = generator.integers(0, count, (resamples, count))
    while (bad := np.ptp(log_m[picks], axis=1) == 0).any():
        picks[bad] = generator.integers(0, count, (int(bad.sum()), count))
    return picks

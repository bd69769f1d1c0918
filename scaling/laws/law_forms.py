"""Functional forms of score against the number of visual tokens, each fitted by least squares in log scores.

All laws share one error model (relative errors of equal size), so that their residuals and AICc are comparable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

# Exponents of the saturating law; at the lower end it is the log-linear law, at the upper a step after the first m.
EXPONENT_RANGE = (1e-2, 5.0)
Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class FittedLaw:
    """One law with its parameters, residual sum of squares of log scores, and AICc (None when n is too small).

    `at_bound` says that the data do not identify the law: a parameter stopped at the end of its range.
    """

    law: str
    formula: str
    parameters: dict[str, float]
    rss_log: float
    n: int
    aicc: float | None
    at_bound: bool = False

    def predict(self, num_visual_tokens: Numbers) -> np.ndarray:
        """Scores at the given m."""
        return LAWS[self.law].predict(np.asarray(num_visual_tokens, dtype=float), **self.parameters)


@dataclass(frozen=True)
class Law:
    """A functional form: `predict(m, **parameters)` and `fit(log_m, log_score) -> (parameters, at_bound)`."""

    formula: str
    predict: Callable[..., np.ndarray]
    fit: Callable[[np.ndarray, np.ndarray], tuple[dict[str, float], bool]]
    num_parameters: int


def solve_power(log_m: np.ndarray, log_score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of log S = log c - alpha log m along the last axis; returns (log c, alpha).

    Args:
        log_m, log_score: (..., n), at least two distinct m in every row.
    """
    centered = log_m - log_m.mean(-1, keepdims=True)
    slope = (centered * log_score).sum(-1) / (centered**2).sum(-1)
    return log_score.mean(-1) - slope * log_m.mean(-1), -slope


def aicc(rss: float, n: int, num_parameters: int) -> float | None:
    """Akaike's criterion with the small-sample correction, k counting the variance; None when n <= k + 1.

    A residual of exactly zero is floored at rounding error, where every law fits perfectly and none is preferred.
    """
    k = num_parameters + 1
    if n - k - 1 <= 0:
        return None
    return float(n * np.log(max(rss, 1e-24) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def fit_law(name: str, m: Numbers, scores: Numbers) -> FittedLaw:
    """Fit one of `LAWS`.

    Raises:
        ValueError: unknown law, or fewer distinct m than the law has parameters.
    """
    if name not in LAWS:
        raise ValueError(f"Unknown law {name!r}; laws are {', '.join(LAWS)}.")
    law = LAWS[name]
    log_m, log_score = np.log(np.asarray(m, dtype=float)), np.log(np.asarray(scores, dtype=float))
    if len(np.unique(log_m)) < law.num_parameters:
        raise ValueError(
            f"The {name} law has {law.num_parameters} parameters; got {len(np.unique(log_m))} different m."
        )
    parameters, at_bound = law.fit(log_m, log_score)
    with np.errstate(all="ignore"):
        residual = log_score - np.log(law.predict(np.exp(log_m), **parameters))
    rss = float((residual**2).sum())
    return FittedLaw(
        name, law.formula, parameters, rss, len(log_m), aicc(rss, len(log_m), law.num_parameters), at_bound
    )


def rank_laws(m: Numbers, scores: Numbers) -> list[FittedLaw]:
    """Every law with fewer parameters than there are different m, best AICc first; those without AICc come last."""
    distinct = len(np.unique(np.asarray(m, dtype=float)))
    fits = [fit_law(name, m, scores) for name, law in LAWS.items() if law.num_parameters < max(distinct, 3)]
    return sorted(fits, key=lambda fit: np.inf if fit.aicc is None else fit.aicc)


def _power(m: np.ndarray, c: float, alpha: float) -> np.ndarray:
    return c * m**-alpha


def _fit_power(log_m: np.ndarray, log_score: np.ndarray) -> tuple[dict[str, float], bool]:
    log_c, alpha = solve_power(log_m, log_score)
    return {"c": float(np.exp(log_c)), "alpha": float(alpha)}, False


def _log_linear(m: np.ndarray, a: float, b: float) -> np.ndarray:
    return a + b * np.log(m)


def _fit_log_linear(log_m: np.ndarray, log_score: np.ndarray) -> tuple[dict[str, float], bool]:
    """Unknowns are the log scores at the smallest and largest m, so the law is positive wherever there are data."""
    low, width = log_m.min(), np.ptp(log_m)
    share = (log_m - low) / width

    def residuals(ends: np.ndarray) -> np.ndarray:
        return np.log(np.exp(ends[0]) * (1 - share) + np.exp(ends[1]) * share) - log_score

    first, last = np.exp(least_squares(residuals, _line_ends(log_m, log_score), method="lm").x)
    b = (last - first) / width
    return {"a": float(first - b * low), "b": float(b)}, False


def _saturating(m: np.ndarray, s_inf: float, a: float, b: float) -> np.ndarray:
    return s_inf - a * m**-b


def _fit_saturating(log_m: np.ndarray, log_score: np.ndarray) -> tuple[dict[str, float], bool]:
    """Unknowns are the log scores at both ends and the exponent b on a logistic scale, from several starts."""
    distance, width = log_m - log_m.min(), np.ptp(log_m)
    lower, upper = np.log(EXPONENT_RANGE)

    def exponent(t: float) -> float:
        return float(np.exp(lower + (upper - lower) / (1 + np.exp(-np.clip(t, -30, 30)))))

    def residuals(x: np.ndarray) -> np.ndarray:
        share = np.expm1(-exponent(x[2]) * distance) / np.expm1(-exponent(x[2]) * width)
        return np.log(np.exp(x[0]) * (1 - share) + np.exp(x[1]) * share) - log_score

    ends = _line_ends(log_m, log_score)
    tries = [least_squares(residuals, [*ends, start], method="lm", max_nfev=400) for start in (-3.0, 0.0, 2.0)]
    best = min(tries, key=lambda result: result.cost).x
    b, (first, last) = exponent(best[2]), np.exp(best[:2])
    # S = first + (last - first) (1 - (m/m1)^-b) / (1 - (m2/m1)^-b), with m1, m2 the smallest and largest m
    scale = (last - first) / -np.expm1(-b * width)
    parameters = {"s_inf": float(first + scale), "a": float(scale * np.exp(b * log_m.min())), "b": b}
    at_bound = bool(b < 1.02 * EXPONENT_RANGE[0] or b > EXPONENT_RANGE[1] / 1.02)
    return parameters, at_bound


def _line_ends(log_m: np.ndarray, log_score: np.ndarray) -> np.ndarray:
    """Log scores of the power law at the smallest and largest m, the start of the other fits."""
    log_c, alpha = solve_power(log_m, log_score)
    return log_c - alpha * np.array([log_m.min(), log_m.max()])


LAWS = {
    "power": Law("c / m^alpha", _power, _fit_power, 2),
    "log_linear": Law("a + b log m", _log_linear, _fit_log_linear, 2),
    "saturating": Law("s_inf - a / m^b", _saturating, _fit_saturating, 3),
}

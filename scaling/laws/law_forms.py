"""Functional forms of score against the number of visual tokens, each fitted by least squares in log scores.

All laws share one error model, so that their residuals and AICc are comparable: relative errors of equal size, or,
where the scores have standard errors, those. Then a chi-square says whether a law holds at all, which no R2 can.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import leastsq
from scipy.special import gammaincc

# Exponents of the saturating law; at the lower end it is the log-linear law, at the upper a step after the first m.
EXPONENT_RANGE = (1e-2, 5.0)
REJECTED_BELOW = 0.01  # p value of the chi-square below which a law is called rejected
Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class FittedLaw:
    """One law with its parameters, residual sum of squares of log scores, and AICc (None when n is too small).

    `at_bound` says that the data do not identify the law: a parameter stopped at the end of its range. Where the scores
    have standard errors, `chi_square` is the sum of squared residuals in units of them (`largest_z` is the largest),
    `p_value` the probability of one as large if the law were true; None without errors or without degrees of freedom.
    """

    law: str
    formula: str
    parameters: dict[str, float]
    rss_log: float
    n: int
    aicc: float | None
    at_bound: bool = False
    chi_square: float | None = None
    degrees: int = 0
    p_value: float | None = None
    largest_z: float | None = None

    @property
    def is_rejected(self) -> bool | None:
        """Whether sampling error alone cannot explain the residuals; None when that cannot be said."""
        return None if self.p_value is None else self.p_value < REJECTED_BELOW

    def predict(self, num_visual_tokens: Numbers) -> np.ndarray:
        """Scores at the given m."""
        return LAWS[self.law].predict(np.asarray(num_visual_tokens, dtype=float), **self.parameters)


@dataclass(frozen=True)
class Law:
    """A functional form: `predict(m, **parameters)`, `fit(log_m, log_score, weight) -> (parameters, at_bound)`.

    `weight` (n,) multiplies the residuals of log scores; None for equal ones.
    """

    formula: str
    predict: Callable[..., np.ndarray]
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray | None], tuple[dict[str, float], bool]]
    num_parameters: int


@dataclass(frozen=True)
class ChiSquare:
    """Squared residuals in units of their standard errors: their sum, and the largest residual with its sign.

    `p_value` is the probability of a sum as large if the law were true; None without degrees of freedom.
    """

    value: float
    degrees: int
    largest_z: float

    @property
    def p_value(self) -> float | None:
        """Upper tail of the chi-square distribution."""
        return float(gammaincc(self.degrees / 2, self.value / 2)) if self.degrees > 0 else None

    @property
    def lack_of_fit(self) -> float | None:
        """How many times as large the residuals are as they should be."""
        return float(np.sqrt(self.value / self.degrees)) if self.degrees > 0 else None


def chi_square(observed: np.ndarray, fitted: np.ndarray, errors: np.ndarray, num_parameters: int) -> ChiSquare:
    """Of points against a law with so many fitted parameters."""
    z = (observed - fitted) / errors
    return ChiSquare(float((z**2).sum()), len(z) - num_parameters, float(z[np.argmax(np.abs(z))]))


def solve_power(
    log_m: np.ndarray, log_score: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of log S = log c - alpha log m along the last axis; returns (log c, alpha).

    Args:
        log_m, log_score: (..., n), at least two distinct m in every row.
        weight: (..., n) of the residuals; equal ones when not given.
    """
    if weight is None:
        centered = log_m - log_m.mean(-1, keepdims=True)
        slope = (centered * log_score).sum(-1) / (centered**2).sum(-1)
        return log_score.mean(-1) - slope * log_m.mean(-1), -slope
    share = weight**2 / (weight**2).sum(-1, keepdims=True)
    mean_m, mean_score = (share * log_m).sum(-1), (share * log_score).sum(-1)
    centered = log_m - mean_m[..., None]
    slope = (share * centered * log_score).sum(-1) / (share * centered**2).sum(-1)
    return mean_score - slope * mean_m, -slope


def aicc(rss: float, n: int, num_parameters: int) -> float | None:
    """Akaike's criterion with the small-sample correction, k counting the variance; None when n <= k + 1.

    A residual of exactly zero is floored at rounding error, where every law fits perfectly and none is preferred.
    """
    k = num_parameters + 1
    if n - k - 1 <= 0:
        return None
    return float(n * np.log(max(rss, 1e-24) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def fit_law(name: str, m: Numbers, scores: Numbers, errors: Numbers | None = None) -> FittedLaw:
    """Fit one of `LAWS`.

    Args:
        name: of the law.
        m, scores: the points.
        errors: standard errors of the scores, positive; they weigh the points and give a chi-square.

    Raises:
        ValueError: unknown law, fewer distinct m than the law has parameters, or an error that is not positive.
    """
    if name not in LAWS:
        raise ValueError(f"Unknown law {name!r}; laws are {', '.join(LAWS)}.")
    law = LAWS[name]
    log_m, score = np.log(np.asarray(m, dtype=float)), np.asarray(scores, dtype=float)
    log_score = np.log(score)
    if len(np.unique(log_m)) < law.num_parameters:
        raise ValueError(
            f"The {name} law has {law.num_parameters} parameters; got {len(np.unique(log_m))} different m."
        )
    weight = relative_weights(score, errors)
    parameters, at_bound = law.fit(log_m, log_score, weight)
    with np.errstate(all="ignore"):
        predicted = law.predict(np.exp(log_m), **parameters)
        residual = log_score - np.log(predicted)
    rss, n = float((residual**2).sum()), len(log_m)
    if weight is None:
        return FittedLaw(name, law.formula, parameters, rss, n, aicc(rss, n, law.num_parameters), at_bound)
    # In units of the scores themselves: their errors are the normal ones.
    found = chi_square(score, predicted, np.asarray(errors, dtype=float), law.num_parameters)
    return FittedLaw(
        name, law.formula, parameters, rss, n, aicc_of_chi_square(found.value, n, law.num_parameters), at_bound,
        found.value, found.degrees, found.p_value, found.largest_z,
    )  # fmt: skip


def relative_weights(scores: np.ndarray, errors: Numbers | None) -> np.ndarray | None:
    """(n,) weights of residuals of log scores: one over the relative error; None without errors.

    Raises:
        ValueError: naming the point whose error is not a positive number.
    """
    if errors is None:
        return None
    error = np.asarray(errors, dtype=float)
    if error.shape != scores.shape:
        raise ValueError(f"{error.size} standard errors for {scores.size} scores.")
    for index, value in enumerate(error):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"Point {index} has the standard error {value:g}; it would decide the fit alone.")
    return scores / error


def aicc_of_chi_square(value: float, n: int, num_parameters: int) -> float | None:
    """As `aicc`, where the errors are known; None when n <= k + 1."""
    k = num_parameters
    return None if n - k - 1 <= 0 else float(value + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def rank_laws(m: Numbers, scores: Numbers, errors: Numbers | None = None) -> list[FittedLaw]:
    """Every law with fewer parameters than there are different m, best AICc first; those without AICc come last."""
    distinct = len(np.unique(np.asarray(m, dtype=float)))
    fits = [fit_law(name, m, scores, errors) for name, law in LAWS.items() if law.num_parameters < max(distinct, 3)]
    return sorted(fits, key=lambda fit: np.inf if fit.aicc is None else fit.aicc)


def _power(m: np.ndarray, c: float, alpha: float) -> np.ndarray:
    return c * m**-alpha


def _fit_power(log_m: np.ndarray, log_score: np.ndarray, weight: np.ndarray | None) -> tuple[dict[str, float], bool]:
    log_c, alpha = solve_power(log_m, log_score, weight)
    return {"c": float(np.exp(log_c)), "alpha": float(alpha)}, False


def _log_linear(m: np.ndarray, a: float, b: float) -> np.ndarray:
    return a + b * np.log(m)


def _fit_log_linear(
    log_m: np.ndarray, log_score: np.ndarray, weight: np.ndarray | None
) -> tuple[dict[str, float], bool]:
    """Unknowns are the log scores at the smallest and largest m, so the law is positive wherever there are data."""
    low, width = log_m.min(), np.ptp(log_m)
    share = (log_m - low) / width

    def lines(ends: np.ndarray, slopes: bool) -> np.ndarray:
        first, last = math.exp(ends[0]) * (1 - share), math.exp(ends[1]) * share
        score = first + last
        return np.array([first / score, last / score]) if slopes else np.log(score) - log_score

    first, last = np.exp(_least_squares(lines, _line_ends(log_m, log_score), weight)[0])
    b = (last - first) / width
    return {"a": float(first - b * low), "b": float(b)}, False


def _saturating(m: np.ndarray, s_inf: float, a: float, b: float) -> np.ndarray:
    return s_inf - a * m**-b


def _fit_saturating(
    log_m: np.ndarray, log_score: np.ndarray, weight: np.ndarray | None
) -> tuple[dict[str, float], bool]:
    """Unknowns are the log scores at both ends and the exponent b on a logistic scale, from several starts."""
    distance, width = log_m - log_m.min(), float(np.ptp(log_m))
    lower, upper = (math.log(end) for end in EXPONENT_RANGE)

    def exponent(t: float) -> tuple[float, float]:
        """b, and its derivative by t."""
        place = 1 / (1 + math.exp(-min(max(t, -30.0), 30.0)))
        b = math.exp(lower + (upper - lower) * place)
        return b, (b * (upper - lower) * place * (1 - place) if abs(t) < 30 else 0.0)

    def curves(x: np.ndarray, slopes: bool) -> np.ndarray:
        b, b_by_t = exponent(x[2])
        rise, whole = np.expm1(-b * distance), math.expm1(-b * width)
        share, start, end = rise / whole, math.exp(x[0]), math.exp(x[1])
        first, last = start * (1 - share), end * share
        score = first + last
        if not slopes:
            return np.log(score) - log_score
        share_by_t = (share * (width * (whole + 1)) - distance * (rise + 1)) * (b_by_t / whole)
        return np.array([first / score, last / score, (end - start) * share_by_t / score])

    ends = _line_ends(log_m, log_score)
    tries = [_least_squares(curves, np.array([*ends, start]), weight) for start in (-3.0, 2.0)]
    is_inside = all(1.02 * EXPONENT_RANGE[0] < exponent(x[2])[0] < EXPONENT_RANGE[1] / 1.02 for x, _ in tries)
    # From both sides to one place inside the range: there is no other.
    if not is_inside or not math.isclose(tries[0][1], tries[1][1], rel_tol=1e-6):
        tries.append(_least_squares(curves, np.array([*ends, 0.0]), weight))
    best = min(tries, key=lambda found: found[1])[0]
    b, (first, last) = exponent(best[2])[0], np.exp(best[:2])
    # S = first + (last - first) (1 - (m/m1)^-b) / (1 - (m2/m1)^-b), with m1, m2 the smallest and largest m
    rise = (last - first) / -np.expm1(-b * width)
    parameters = {"s_inf": float(first + rise), "a": float(rise * np.exp(b * log_m.min())), "b": b}
    at_bound = bool(b < 1.02 * EXPONENT_RANGE[0] or b > EXPONENT_RANGE[1] / 1.02)
    return parameters, at_bound


def _least_squares(
    model: Callable[[np.ndarray, bool], np.ndarray], start: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """Parameters where the weighted squares of `model` are least, from `start`, and their sum.

    MINPACK's Levenberg-Marquardt, called without the wrapper that inspects every problem: there are thousands of them.

    Args:
        model: of parameters (p,), residuals (n,) or, asked for slopes, their derivatives (p, n).
        start: (p,).
        weight: (n,) of the residuals.
    """
    scale = 1.0 if weight is None else weight
    found, _, info, _, _ = leastsq(
        lambda x: scale * model(x, False), start, Dfun=lambda x: scale * model(x, True), col_deriv=True,
        full_output=True, ftol=1e-8, xtol=1e-8, gtol=1e-8, maxfev=400, diag=np.ones(len(start)),
    )  # fmt: skip
    return found, float((info["fvec"] ** 2).sum())


def _line_ends(log_m: np.ndarray, log_score: np.ndarray) -> np.ndarray:
    """Log scores of the power law at the smallest and largest m, the start of the other fits."""
    log_c, alpha = solve_power(log_m, log_score)
    return log_c - alpha * np.array([log_m.min(), log_m.max()])


LAWS = {
    "power": Law("c / m^alpha", _power, _fit_power, 2),
    "log_linear": Law("a + b log m", _log_linear, _fit_log_linear, 2),
    "saturating": Law("s_inf - a / m^b", _saturating, _fit_saturating, 3),
}

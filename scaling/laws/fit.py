"""Fit S(m) = c / m^alpha, the paper's scaling law of performance in the number of visual tokens.

The law and its fit: docs/theory.md, "From divergence to scores" and "Fitting scores".

`fit_power_law` takes two lists; `fit_curve` takes a `Curve` read from a file and adds rival laws and held-out errors.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np

from fusedvlm.scaling.score_records import Curve

from .law_forms import LAWS, FittedLaw, Numbers, chi_square, fit_law, rank_laws, relative_weights, solve_power as solve


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted S(m) = c / m^alpha.

    `alpha` is negative where scores rise with m. `r2` is the share of the variance of log S explained, the space in
    which the law is fitted; `r2_score` is the same for S itself. Intervals are (low, high) percentile intervals of a
    bootstrap over the points; None with only two different m, where the law passes through every resample. Where the
    scores have standard errors, `alpha_error` is what they alone leave open about alpha, and `lack_of_fit` how many
    times as large the residuals are as they should be (the square root of chi-square per degree of freedom).
    `alpha_question_interval` is the bootstrap interval over questions, where the scores of single ones were kept: the
    same questions at every m, so that what they have in common at all m does not count as noise.
    """

    c: float
    alpha: float
    r2: float
    n: int
    c_interval: tuple[float, float] | None
    alpha_interval: tuple[float, float] | None
    confidence: float
    r2_score: float
    alpha_error: float | None = None
    lack_of_fit: float | None = None
    alpha_question_interval: tuple[float, float] | None = None

    def predict(self, num_visual_tokens: Numbers) -> np.ndarray:
        """Fitted scores at the given m."""
        return self.c * np.asarray(num_visual_tokens, dtype=float) ** -self.alpha


@dataclass(frozen=True)
class HeldOutError:
    """Errors of a law at points it has not seen: each m left out in turn, relative to the score there.

    `at_ends` are the extrapolations to the smallest and the largest m; `rms` is over all of them.
    """

    law: str
    rms: float
    at_ends: tuple[float, float]


@dataclass(frozen=True)
class CurveFit:
    """Everything the fit of one curve says; `laws` are ranked by AICc, best first."""

    curve: Curve
    power: PowerLawFit
    laws: tuple[FittedLaw, ...]
    held_out: tuple[HeldOutError, ...]

    @property
    def verdict(self) -> str:
        """Which laws the standard errors leave standing, in words."""
        tested = [law for law in self.laws if law.is_rejected is not None]
        if not tested:
            return "not tested: " + ("too few m" if self.curve.errors is not None else "no standard errors")
        standing = [law.law for law in tested if not law.is_rejected]
        power = next((law for law in tested if law.law == "power"), None)
        said = "" if power is None else f"power {'rejected' if power.is_rejected else 'holds'}"
        if power is not None and power.is_rejected and power.largest_z is not None:
            said += f" (z up to {abs(power.largest_z):.1f})"
        others = [name for name in standing if name != "power"]
        return said + (f"; {', '.join(others)} hold{'s' * (len(others) == 1)}" if others else "; no other holds")

    def record(self) -> dict:
        """One flat JSON-ready record: the curve's columns, the power law, and the other laws beneath."""
        held_out = {error.law: error for error in self.held_out}
        return {
            **self.curve.columns,
            **asdict(self.power),
            "m": self.curve.m,
            "score": self.curve.scores,
            "excluded_m": [point.m for point in self.curve.excluded],
            "excluded_score": [point.score for point in self.curve.excluded],
            "standard_error": self.curve.errors,
            "best_law": self.laws[0].law,
            "verdict": self.verdict,
            "laws": [_law_record(law, held_out.get(law.law), self.laws[0].aicc) for law in self.laws],
        }


def check_points(num_visual_tokens: Numbers, scores: Numbers) -> tuple[np.ndarray, np.ndarray]:
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
        raise ValueError(
            f"A fit needs scores at two or more numbers of visual tokens, got m={sorted(set(m.tolist()))}."
        )
    return m, score


def fit_power_law(
    num_visual_tokens: Numbers,
    scores: Numbers,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    errors: Numbers | None = None,
) -> PowerLawFit:
    """Exact least squares in logs; the same optimum as the paper's BFGS (docs/theory.md, "Fitting scores").

    Args:
        num_visual_tokens, scores: the points, positive numbers.
        confidence: of the bootstrap intervals.
        resamples: bootstrap resamples; those with a single m are redrawn.
        seed: of the bootstrap.
        errors: standard errors of the scores; they weigh the points.

    Raises:
        ValueError: see `check_points` and `relative_weights`; or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not between 0 and 1.")
    m, score = check_points(num_visual_tokens, scores)
    weight = relative_weights(score, errors)
    log_c, alpha = solve(np.log(m), np.log(score), weight)
    c_interval = alpha_interval = None
    if len(np.unique(m)) > 2:
        boot_log_c, boot_alpha = bootstrap_power_law(m, score, resamples, seed, errors)
        c_low, c_high = np.exp(percentile_interval(boot_log_c, confidence))
        alpha_low, alpha_high = percentile_interval(boot_alpha, confidence)
        c_interval, alpha_interval = (float(c_low), float(c_high)), (float(alpha_low), float(alpha_high))
    return PowerLawFit(
        c=float(np.exp(log_c)),
        alpha=float(alpha),
        r2=_r_squared(np.log(score), log_c - alpha * np.log(m)),
        n=len(m),
        c_interval=c_interval,
        alpha_interval=alpha_interval,
        confidence=confidence,
        r2_score=_r_squared(score, np.exp(log_c) * m**-alpha),
        **_error_parts(m, score, weight, np.exp(log_c) * m**-alpha),
    )


def _error_parts(m: np.ndarray, score: np.ndarray, weight: np.ndarray | None, fitted: np.ndarray) -> dict:
    """What sampling leaves open about alpha, and how far the residuals are beyond it."""
    if weight is None:
        return {}
    share = weight**2
    spread = np.log(m) - (share * np.log(m)).sum() / share.sum()
    found = chi_square(score, fitted, score / weight, num_parameters=2)
    return {"alpha_error": float(1 / np.sqrt((share * spread**2).sum())), "lack_of_fit": found.lack_of_fit}


def bootstrap_power_law(
    num_visual_tokens: Numbers,
    scores: Numbers,
    resamples: int = 2000,
    seed: int = 0,
    errors: Numbers | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(log c, alpha) of every resample of the points, two arrays of length `resamples`.

    Raises:
        ValueError: see `check_points`.
    """
    m, score = check_points(num_visual_tokens, scores)
    log_m, log_score = np.log(m), np.log(score)
    picks = _resample(len(m), log_m, resamples, np.random.default_rng(seed))
    weight = relative_weights(score, errors)
    return solve(log_m[picks], log_score[picks], None if weight is None else weight[picks])


def bootstrap_questions(
    num_visual_tokens: Numbers,
    question_scores: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    errors: Numbers | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(log c, alpha) of every resample of the questions; resamples in which some m scores zero are left out.

    Args:
        num_visual_tokens: (points,) m.
        question_scores: (points, questions), the same questions at every m.
        errors: standard errors of the points; they weigh them.

    Raises:
        ValueError: see `check_points` and `relative_weights`.
    """
    m, score = check_points(num_visual_tokens, question_scores.mean(1))
    questions = question_scores.shape[1]
    drawn = np.random.default_rng(seed).multinomial(questions, [1 / questions] * questions, resamples)
    means = drawn @ question_scores.T / questions
    means = means[(means > 0).all(1)]
    weight = relative_weights(score, errors)
    weights = None if weight is None else np.broadcast_to(weight, means.shape)
    return solve(np.broadcast_to(np.log(m), means.shape), np.log(means), weights)


def predict_interval(
    num_visual_tokens: Numbers,
    scores: Numbers,
    at: Numbers,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) bootstrap interval of the fitted curve at the m in `at`.

    Raises:
        ValueError: see `check_points`.
    """
    log_c, alpha = bootstrap_power_law(num_visual_tokens, scores, resamples, seed)
    curves = np.exp(log_c[:, None] - alpha[:, None] * np.log(np.asarray(at, dtype=float)))
    low, high = percentile_interval(curves, confidence)
    return low, high


def percentile_interval(draws: np.ndarray, confidence: float) -> np.ndarray:
    """(2, ...) lower and upper ends of the central interval along the first axis."""
    return np.percentile(draws, [50 * (1 - confidence), 50 * (1 + confidence)], axis=0)


def held_out_error(law: str, num_visual_tokens: Numbers, scores: Numbers) -> HeldOutError | None:
    """Leave out every m in turn, fit the rest, and compare with the scores left out.

    Returns None where the rest has too few different m for the law.

    Raises:
        ValueError: see `check_points` and `fit_law`.
    """
    m, score = check_points(num_visual_tokens, scores)
    distinct = np.unique(m)
    if len(distinct) <= LAWS[law].num_parameters:
        return None
    errors = []
    for left_out in distinct:
        held = m == left_out
        predicted = fit_law(law, m[~held], score[~held]).predict(m[held])
        errors.append(float(np.mean((predicted - score[held]) / score[held])))
    return HeldOutError(law, float(np.sqrt(np.mean(np.square(errors)))), (errors[0], errors[-1]))


def fit_curve(curve: Curve, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> CurveFit:
    """Power law with intervals, rival laws ranked by AICc, and held-out errors of one curve.

    Raises:
        ValueError: see `fit_power_law`.
    """
    power = fit_power_law(curve.m, curve.scores, confidence, resamples, seed, curve.errors)
    if (single := curve.question_scores) is not None:
        _, alphas = bootstrap_questions(curve.m, single, resamples, seed, curve.errors)
        if len(alphas) >= 0.9 * resamples:  # else what is left of them is a biased choice
            low, high = percentile_interval(alphas, confidence)
            power = replace(power, alpha_question_interval=(float(low), float(high)))
    laws = tuple(rank_laws(curve.m, curve.scores, curve.errors))
    errors = (held_out_error(law.law, curve.m, curve.scores) for law in laws)
    return CurveFit(curve, power, laws, tuple(error for error in errors if error is not None))


def _law_record(law: FittedLaw, error: HeldOutError | None, best: float | None) -> dict:
    return {
        "law": law.law,
        "formula": law.formula,
        "parameters": law.parameters,
        "aicc": law.aicc,
        "delta_aicc": None if law.aicc is None or best is None else law.aicc - best,
        "at_bound": law.at_bound,
        "chi_square": law.chi_square,
        "degrees": law.degrees,
        "p_value": law.p_value,
        "largest_z": law.largest_z,
        "is_rejected": law.is_rejected,
        "held_out_rms": None if error is None else error.rms,
        "held_out_at_ends": None if error is None else list(error.at_ends),
    }


def _r_squared(observed: np.ndarray, predicted: np.ndarray) -> float:
    spread = ((observed - observed.mean()) ** 2).sum()
    return 1.0 if spread == 0 else float(1 - ((observed - predicted) ** 2).sum() / spread)


def _resample(count: int, log_m: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(resamples, count) indices with replacement, each row with at least two distinct m."""
    picks = generator.integers(0, count, (resamples, count))
    while (bad := np.ptp(log_m[picks], axis=1) == 0).any():
        picks[bad] = generator.integers(0, count, (int(bad.sum()), count))
    return picks

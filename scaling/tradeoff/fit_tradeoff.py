"""Visual tokens against LLM parameters ("Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters").

Downstream error Y = 1 - accuracy = A / (N^alpha T^beta) + D with N the LLM's parameters in 1e9, and inference cost
2 N (Q + V) FLOPs for V visual and Q text tokens. T is either V ("vision") or V + Q ("vision+text").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq, least_squares
from scipy.special import fdtri

from fusedvlm.files import read_table
from fusedvlm.scaling.laws.law_forms import REJECTED_BELOW, ChiSquare, chi_square

PUBLISHED_GRID = Path(__file__).parent / "token_parameter_grid.csv"
CONVENTIONS = ("vision", "vision+text")
NAMES = ("a", "alpha", "beta", "d")


@dataclass(frozen=True)
class GridCell:
    """Accuracy in (0, 1) of an LLM of `llm_params_b` * 1e9 parameters reading `num_visual_tokens` tokens.

    `standard_error` is that of the accuracy, None where none is known.
    """

    llm_params_b: float
    num_visual_tokens: int
    score: float
    place: str = ""
    standard_error: float | None = None


@dataclass(frozen=True)
class TradeoffFit:
    """Fitted Y = a / (N^alpha T^beta) + d, d inside `d_bounds`.

    `squared_error` is the sum over the cells. `intervals` are profile intervals: all values of a parameter whose best
    fit is not worse than an F test at `confidence` allows, cut at the bounds. `warnings` say which bound is active and
    which cells look doubtful. Where every cell has a standard error, the squares are weighed by them, and `goodness`
    says whether sampling alone explains the residuals.
    """

    a: float
    alpha: float
    beta: float
    d: float
    squared_error: float
    n: int
    convention: str
    text_tokens: int
    d_bounds: tuple[float, float]
    intervals: dict[str, tuple[float, float]]
    confidence: float
    warnings: tuple[str, ...]
    goodness: ChiSquare | None = None

    @property
    def verdict(self) -> str:
        """Whether the standard errors leave the law standing, in words."""
        if self.goodness is None or self.goodness.p_value is None:
            return "not tested: no standard errors" if self.goodness is None else "not tested: too few cells"
        if self.goodness.p_value < REJECTED_BELOW:
            return f"rejected (z up to {abs(self.goodness.largest_z):.1f})"
        return "holds"

    def error(self, llm_params_b: float | np.ndarray, num_visual_tokens: float | np.ndarray) -> np.ndarray:
        """Predicted error 1 - accuracy."""
        tokens = _tokens(np.asarray(num_visual_tokens, dtype=float), self.convention, self.text_tokens)
        return self.a * np.asarray(llm_params_b, dtype=float) ** -self.alpha * tokens**-self.beta + self.d


@dataclass(frozen=True)
class Choice:
    """One LLM with the most visual tokens a budget allows it, and the error predicted there."""

    llm_params_b: float
    num_visual_tokens: int
    flops: float
    error: float


def read_grid(source: str | Path = PUBLISHED_GRID, task: str | None = "reasoning") -> list[GridCell]:
    """Read a grid: CSV with columns llm_params_b, num_visual_tokens, score (accuracy in (0, 1)), optionally task and
    standard_error.

    Args:
        source: path; the published grid by default.
        task: rows to keep where the file has a column `task`; None keeps all.

    Raises:
        ValueError: naming the row, for missing columns, values out of range and duplicates.
    """
    rows = read_table(source, ("llm_params_b", "num_visual_tokens", "score"))
    tasks = sorted({row["task"] for _, row in rows if "task" in row})
    if tasks and task is not None:
        rows = [(place, row) for place, row in rows if row["task"] == task]
        if not rows:
            raise ValueError(f"{source}: no task {task!r}; there are {', '.join(tasks)}.")
    cells = [_cell(row, place, source) for place, row in rows]
    seen: dict[tuple, GridCell] = {}
    for cell in cells:
        first = seen.setdefault((cell.llm_params_b, cell.num_visual_tokens), cell)
        if first is not cell:
            raise ValueError(f"{source}, {cell.place}: duplicate of {first.place}.")
    return cells


def read_grids(source: str | Path) -> dict[str, list[GridCell]]:
    """{task: cells} of a grid with a column `task`; {"": cells} of one without. Errors as of `read_grid`."""
    rows = read_table(source, ("llm_params_b", "num_visual_tokens", "score"))
    tasks = list(dict.fromkeys(row["task"] for _, row in rows if "task" in row))
    return {task: read_grid(source, task) for task in tasks} if tasks else {"": read_grid(source)}


def _cell(row: dict, place: str, source: str | Path) -> GridCell:
    try:
        n, v, score = float(row["llm_params_b"]), float(row["num_visual_tokens"]), float(row["score"])
        error = float(row["standard_error"]) if row.get("standard_error") else None
    except (TypeError, ValueError):
        raise ValueError(f"{source}, {place}: {dict(row)} has a value that is not a number.") from None
    if not (np.isfinite(n) and n > 0 and v >= 1 and v == int(v) and 0 < score < 1):
        raise ValueError(
            f"{source}, {place}: llm_params_b={n:g}, num_visual_tokens={v:g}, score={score:g}; need positive sizes, "
            "whole tokens from 1 and an accuracy between 0 and 1 (divide per cent by 100)."
        )
    if error is not None and not (np.isfinite(error) and error > 0):
        raise ValueError(f"{source}, {place}: standard_error={error:g} is not positive; leave it empty if unknown.")
    return GridCell(n, int(v), score, place, error)


def fit_tradeoff(
    cells: Sequence[GridCell],
    convention: str = "vision",
    text_tokens: int = 0,
    d_bounds: tuple[float, float] = (0.0, 0.3),
    confidence: float = 0.95,
) -> TradeoffFit:
    """Least squares of the error with bounds on D.

    Args:
        cells: at least five, with two LLM sizes and two token counts.
        convention: "vision" (T = V) or "vision+text" (T = V + text_tokens).
        text_tokens: Q of the convention "vision+text"; also remembered as the default Q of budgets.
        d_bounds: of D. Without a lower bound the fit is degenerate: D runs to minus infinity.
        confidence: of the profile intervals.

    Raises:
        ValueError: for an unknown convention, bounds in the wrong order, or too small a grid.
    """
    _check_fit(cells, convention, d_bounds)
    n, v, y = (np.array(column, dtype=float) for column in zip(*[_triple(cell) for cell in cells], strict=True))
    log_n, log_t = np.log(n), np.log(_tokens(v, convention, text_tokens))
    errors = _standard_errors(cells)
    problem = _Problem(log_n, log_t, y, d_bounds, None if errors is None else errors.mean() / errors)
    best, cost = problem.solve({})
    intervals = {name: problem.interval(name, best, cost, confidence) for name in NAMES}
    warnings = (*_bound_warnings(best["d"], d_bounds), *_repeated_cells(cells))
    fitted = best["a"] * n ** -best["alpha"] * np.exp(log_t) ** -best["beta"] + best["d"]
    return TradeoffFit(
        **best,
        squared_error=float(((fitted - y) ** 2).sum()),
        n=len(cells),
        convention=convention,
        text_tokens=text_tokens,
        d_bounds=d_bounds,
        intervals=intervals,
        confidence=confidence,
        warnings=warnings,
        goodness=None if errors is None else chi_square(y, fitted, errors, len(NAMES)),
    )


def optimal_visual_tokens(fit: TradeoffFit, text_tokens: int, max_visual_tokens: int = 576) -> int:
    """V that minimizes the error along 2 N (Q + V) = const when N can be chosen freely: the budget drops out.

    With T = V it is Q beta / (alpha - beta), at least 1; with T = V + Q it is 1 as long as alpha > beta. Where
    alpha <= beta tokens are worth more than parameters at any price, and `max_visual_tokens` is returned.

    Raises:
        ValueError: negative text_tokens.
    """
    if text_tokens < 0:
        raise ValueError(f"text_tokens={text_tokens} is negative.")
    if fit.alpha <= fit.beta:
        return max_visual_tokens
    if fit.convention == "vision+text":
        return 1
    return int(np.clip(round(text_tokens * fit.beta / (fit.alpha - fit.beta)), 1, max_visual_tokens))


def choices_for_budget(
    fit: TradeoffFit,
    flops: float,
    llm_params_b: Sequence[float],
    text_tokens: int = 0,
    max_visual_tokens: int = 576,
) -> list[Choice]:
    """Every LLM with the most visual tokens that fit 2 N (Q + V) <= flops, the lowest predicted error first.

    Raises:
        ValueError: when not even the smallest LLM can afford one visual token.
    """
    choices = []
    for size in llm_params_b:
        tokens = min(int(flops / (2e9 * size) - text_tokens + 1e-9), max_visual_tokens)
        if tokens >= 1:
            cost = 2e9 * size * (text_tokens + tokens)
            choices.append(Choice(size, tokens, cost, float(fit.error(size, tokens))))
    if not choices:
        least = 2e9 * min(llm_params_b) * (text_tokens + 1)
        raise ValueError(f"A budget of {flops:.3g} FLOPs buys no visual token; the least is {least:.3g} FLOPs.")
    return sorted(choices, key=lambda choice: choice.error)


class _Problem:
    """Least squares in (log a, alpha, beta, d) with any of them fixed; the work horse of fit and profiles."""

    def __init__(
        self,
        log_n: np.ndarray,
        log_t: np.ndarray,
        y: np.ndarray,
        d_bounds: tuple[float, float],
        weight: np.ndarray | None = None,
    ) -> None:
        self.log_n, self.log_t, self.y, self.weight = log_n, log_t, y, 1.0 if weight is None else weight
        top = min(d_bounds[1], float(y.min()) * (1 - 1e-6))  # D above the smallest error leaves nothing to explain
        self.bounds = {"a": (-20, 20), "alpha": (-5, 5), "beta": (-5, 5), "d": (d_bounds[0], top)}

    def solve(self, fixed: dict[str, float]) -> tuple[dict[str, float], float]:
        """Best parameters and their sum of squares, from starts at both ends and the middle of D's range."""
        free = [name for name in NAMES if name not in fixed]
        lower, upper = zip(*[self.bounds[name] for name in free], strict=True)
        solutions = []
        for share in (0.0, 0.5, 0.95) if "d" in free else (0.0,):
            start = np.clip([self._start(fixed, share)[name] for name in free], lower, upper)

            def residuals(x: np.ndarray) -> np.ndarray:
                return self._residuals({**fixed, **dict(zip(free, x, strict=True))})

            solutions.append(least_squares(residuals, start, bounds=(lower, upper), xtol=1e-12, ftol=1e-12, gtol=1e-12))
        best = min(solutions, key=lambda solution: solution.cost)
        values = {**fixed, **dict(zip(free, best.x, strict=True))}
        parameters = {name: float(np.exp(values[name]) if name == "a" else values[name]) for name in NAMES}
        parameters["d"] = self._snap(parameters["d"])
        return parameters, float(2 * best.cost)

    def _snap(self, d: float) -> float:
        """The interior-point solver stops a hair inside a bound that is active."""
        nearest = min(self.bounds["d"], key=lambda end: abs(end - d))
        return float(nearest if abs(nearest - d) < 1e-8 else d)

    def interval(self, name: str, best: dict[str, float], cost: float, confidence: float) -> tuple[float, float]:
        """Profile interval: where the best cost with the parameter fixed crosses the F threshold."""
        freedom = max(len(self.y) - len(NAMES), 1)
        limit = cost * (1 + fdtri(1, freedom, confidence) / freedom)
        limit = max(limit, cost + 1e-12 * float(self.y @ self.y))  # exact data: the solver's own precision
        center = np.log(best[name]) if name == "a" else best[name]

        def excess(value: float) -> float:
            return self.solve({name: value})[1] - limit

        ends = [self._crossing(excess, center, bound) for bound in self.bounds[name]]
        low, high = np.exp(ends) if name == "a" else ends
        return float(low), float(high)

    def _crossing(self, excess: Any, center: float, bound: float) -> float:
        """First crossing between the optimum and a bound, or the bound itself."""
        step, inside = max(abs(center), 0.05) * 0.05 * np.sign(bound - center), center
        while abs(inside - bound) > 1e-9:
            outside = inside + step if abs(inside + step - center) < abs(bound - center) else bound
            if excess(outside) > 0:
                return float(brentq(excess, inside, outside, xtol=1e-6 * max(abs(center), 1)))
            inside, step = outside, step * 2
        return bound

    def _start(self, fixed: dict[str, float], share: float) -> dict[str, float]:
        low, high = self.bounds["d"]
        d = fixed.get("d", low + share * (high - low))
        design = np.stack([np.ones_like(self.log_n), -self.log_n, -self.log_t], axis=1)
        log_a, alpha, beta = np.linalg.lstsq(design, np.log(np.maximum(self.y - d, 1e-9)), rcond=None)[0]
        return {"a": log_a, "alpha": alpha, "beta": beta, "d": d}

    def _residuals(self, p: dict[str, float]) -> np.ndarray:
        predicted = np.exp(p["a"] - p["alpha"] * self.log_n - p["beta"] * self.log_t) + p["d"]
        return self.weight * (predicted - self.y)


def _tokens(visual: np.ndarray, convention: str, text_tokens: int) -> np.ndarray:
    return visual + text_tokens if convention == "vision+text" else visual


def _triple(cell: GridCell) -> tuple[float, float, float]:
    return cell.llm_params_b, cell.num_visual_tokens, 1 - cell.score


def _standard_errors(cells: Sequence[GridCell]) -> np.ndarray | None:
    """(n,) standard errors; None unless every cell has one."""
    stated = [cell.standard_error for cell in cells if cell.standard_error is not None]
    return np.array(stated) if len(stated) == len(cells) else None


def _check_fit(cells: Sequence[GridCell], convention: str, d_bounds: tuple[float, float]) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"Unknown convention {convention!r}; T is one of {', '.join(CONVENTIONS)}.")
    if not d_bounds[0] < d_bounds[1]:
        raise ValueError(f"Bounds of D {d_bounds} are not in order.")
    sizes, counts = {c.llm_params_b for c in cells}, {c.num_visual_tokens for c in cells}
    if len(cells) < 5 or len(sizes) < 2 or len(counts) < 2:
        raise ValueError(
            f"{len(cells)} cells over {len(sizes)} LLMs and {len(counts)} token counts; four parameters need at least "
            "five cells, two LLMs and two token counts."
        )
    if (lowest := min(1 - cell.score for cell in cells)) <= d_bounds[0]:
        raise ValueError(f"D >= {d_bounds[0]} but the smallest error is {lowest:g}.")


def _bound_warnings(d: float, bounds: tuple[float, float]) -> tuple[str, ...]:
    width = bounds[1] - bounds[0]
    if min(d - bounds[0], bounds[1] - d) > 1e-4 * width:
        return ()
    end = "lower" if d - bounds[0] < bounds[1] - d else "upper"
    return (f"D={d:.4g} is at its {end} bound: the data do not identify D, and the other parameters depend on it.",)


def _repeated_cells(cells: Sequence[GridCell]) -> tuple[str, ...]:
    """Two LLMs with the very same score at the same number of tokens look like a copying mistake."""
    seen: dict[tuple, GridCell] = {}
    warnings = []
    for cell in cells:
        other = seen.setdefault((cell.num_visual_tokens, cell.score), cell)
        if other is not cell:
            warnings.append(
                f"{cell.place or 'A cell'} (N={cell.llm_params_b:g}, V={cell.num_visual_tokens}) repeats the score of "
                f"{other.place or 'another'} (N={other.llm_params_b:g})."
            )
    return tuple(warnings)

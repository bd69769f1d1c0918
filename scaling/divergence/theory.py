"""Divergence of two branches in closed form and in general.

Source: "Scaling Capability in Token Space"; the equations are in docs/theory.md, "The bound" and the sections after it.

Notation: n tokens after a shared prefix; psi_eq, psi_aa, psi_ab the mean cosines of states at the same position of both
branches, at other positions of one branch (mean of both branches), at other positions across branches;
delta = psi_aa - psi_ab; Upsilon(n) the bound's square up to a factor. Nothing here returns NaN: outside its domain a
function raises `ValueError` with the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ArrayLike = float | Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Dependency:
    """Constant dependency measures psi_eq, psi_aa, psi_ab, cosines in [-1, 1].

    Raises:
        ValueError: for a value outside [-1, 1], or psi_eq = 1, where the branches never part.
    """

    psi_eq: float
    psi_aa: float
    psi_ab: float

    def __post_init__(self) -> None:
        for name in ("psi_eq", "psi_aa", "psi_ab"):
            value = getattr(self, name)
            if not -1 <= value <= 1:
                raise ValueError(f"{name}={value} is not a cosine in [-1, 1].")
        if self.psi_eq == 1:
            raise ValueError("psi_eq=1: both branches have the same states, Upsilon(1) is 0 and alpha is undefined.")

    @property
    def delta(self) -> float:
        """psi_aa - psi_ab: its sign decides between the three cases."""
        return self.psi_aa - self.psi_ab

    @property
    def max_tokens(self) -> float:
        """Largest n with a real bound: infinite for delta >= 0, else 1 + (1 - psi_eq)/|delta|."""
        return np.inf if self.delta >= 0 else 1 + (1 - self.psi_eq) / -self.delta

    @property
    def n_balance(self) -> float:
        """n at which the linear and quadratic parts are equal, (1 - psi_eq)/delta - 1; infinite for delta = 0.

        Below 1 the quadratic part dominates at every n >= 1.

        Raises:
            ValueError: delta < 0, where the quadratic part only subtracts.
        """
        if self.delta < 0:
            raise ValueError(f"n_balance needs psi_aa >= psi_ab; delta is {self.delta:g}. {self._domain()}")
        return np.inf if self.delta == 0 else (1 - self.psi_eq) / self.delta - 1

    def upsilon(self, n: ArrayLike) -> np.ndarray:
        """Upsilon(n) = n (1 - psi_eq) + (n^2 - n) delta. Raises `ValueError` outside the domain."""
        n = self._check(n)
        return np.maximum(n * (1 - self.psi_eq) + n * (n - 1) * self.delta, 0.0)

    def rho(self, n: ArrayLike) -> np.ndarray:
        """Ratio of the linear to the quadratic part, n_balance / n; infinite for delta = 0.

        Raises:
            ValueError: outside the domain, and for delta < 0.
        """
        n, balance = self._check(n), self.n_balance
        return np.full_like(n, np.inf) if np.isinf(balance) else balance / n

    def regime(self, n: float) -> str:
        """ "sqrt" while the linear part dominates (E[D] grows as the square root of n), "linear" once it does not.

        For delta < 0 the answer is "shrinking": the branches' states cancel and growth stops before `max_tokens`.
        """
        n = float(self._check(n))
        if self.delta < 0:
            return "shrinking"
        return "sqrt" if n < self.n_balance else "linear"

    def alpha(self, n: ArrayLike, beta: float = 1.0) -> np.ndarray:
        """alpha(n) of S(n) = c / n^alpha(n) with S proportional to E[D(n)]^beta, all three cases.

        -beta/2 for delta = 0; from there to -beta, the limit of large n, for delta > 0 (falling where n_balance > 0,
        which is the paper's case; rising where n_balance < 0). n = 1 is the limit, -beta/2 (1 + delta/(1 - psi_eq)).

        Raises:
            ValueError: beta <= 0, n outside the domain, or Upsilon(n) = 0, where alpha is infinite.
        """
        _check_beta(beta)
        n = self._check(n)
        ratio = self.delta / (1 - self.psi_eq)
        growth = 1 + (n - 1) * ratio  # Upsilon(n) / (n Upsilon(1))
        if (growth <= 0).any():
            raise ValueError(f"Upsilon is 0 at n={n[growth <= 0].min():g}, where alpha is infinite. {self._domain()}")
        distance = n - 1
        safe = np.where(distance == 0, 1.0, distance)
        slope = np.where(distance == 0, ratio, np.log1p(safe * ratio * (distance != 0)) / np.log1p(safe))
        return -beta / 2 * (1 + slope)

    def _check(self, n: ArrayLike) -> np.ndarray:
        n = np.asarray(n, dtype=float)
        if not (np.isfinite(n) & (n >= 1)).all():
            raise ValueError(f"n counts tokens from 1; got {n[~(np.isfinite(n) & (n >= 1))].ravel()[0]}.")
        if (n > self.max_tokens * (1 + 1e-12)).any():
            raise ValueError(f"n={n.max():g} is outside the bound's domain. {self._domain()}")
        return n

    def _domain(self) -> str:
        return f"For delta={self.delta:g} the bound is real only for n <= {self.max_tokens:g}."


def upsilon(psi_eq: ArrayLike, psi_aa: ArrayLike, psi_ab: ArrayLike) -> np.ndarray:
    """Upsilon(n) for n = 1 ... N from measured psi(n), arrays of length N (docs/theory.md, "The bound").

    psi_aa(1) and psi_ab(1) have no pairs of positions behind them and are not read. Values may be negative: then the
    bound says nothing at that n; `first_without_bound` finds it.

    Raises:
        ValueError: arrays of different length, or values that are not finite.
    """
    psi_eq, psi_aa, psi_ab = (np.asarray(psi, dtype=float) for psi in (psi_eq, psi_aa, psi_ab))
    if not psi_eq.shape == psi_aa.shape == psi_ab.shape or psi_eq.ndim != 1 or psi_eq.size == 0:
        raise ValueError(f"psi arrays of shapes {psi_eq.shape}, {psi_aa.shape}, {psi_ab.shape}; need one length.")
    n = np.arange(1, len(psi_eq) + 1)
    delta = np.where(n > 1, psi_aa - psi_ab, 0.0)
    values = n * (1 - psi_eq) + n * (n - 1.0) * delta
    if not np.isfinite(values).all():
        raise ValueError(f"psi is not finite at n={int(n[~np.isfinite(values)][0])}.")
    return values


def first_without_bound(values: ArrayLike) -> int | None:
    """Smallest n whose Upsilon(n) is not positive, None when the bound holds everywhere."""
    bad = np.flatnonzero(np.asarray(values) <= 0)
    return int(bad[0]) + 1 if bad.size else None


def alpha_from_upsilon(values: ArrayLike, beta: float = 1.0) -> np.ndarray:
    """alpha(n) = -(beta/2) log_n(Upsilon(n)/Upsilon(1)) for n = 1 ... N from Upsilon(1 ... N), the general case.

    n = 1 is the limit of the parabola through 0, Upsilon(1) and Upsilon(2): its logarithmic slope Upsilon(2)/(2
    Upsilon(1)). It is exact for constant psi; with a single value there is no slope and -beta/2 is returned.

    Raises:
        ValueError: beta <= 0, or a value that is not positive; the first such n is named.
    """
    _check_beta(beta)
    values = _check_bound(values)
    n = np.arange(1, len(values) + 1)
    logs = np.log(values / values[0])
    slopes = np.empty(len(values))
    slopes[0] = values[1] / (2 * values[0]) if len(values) > 1 else 1.0
    slopes[1:] = logs[1:] / np.log(n[1:])
    return -beta / 2 * slopes


def fit_lambda(mean_distance: ArrayLike, values: ArrayLike) -> float:
    """lambda that minimizes mean_n (E[D(n)] - lambda sqrt(Upsilon(n)))^2, exactly (docs/theory.md, "The bound").

    Raises:
        ValueError: different lengths, or an Upsilon that is not positive.
    """
    values, mean_distance = _check_bound(values), np.asarray(mean_distance, dtype=float)
    if mean_distance.shape != values.shape:
        raise ValueError(f"{mean_distance.size} distances for {values.size} values of Upsilon.")
    return float((mean_distance * np.sqrt(values)).sum() / values.sum())


def _check_beta(beta: float) -> None:
    if not (np.isfinite(beta) and beta > 0):
        raise ValueError(f"beta={beta}; performance rises with divergence only for beta > 0.")


def _check_bound(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("Upsilon must be a list of finite numbers, one for each n from 1.")
    if (n := first_without_bound(values)) is not None:
        raise ValueError(f"Upsilon({n})={values[n - 1]:g} is not positive; the bound holds only for n < {n}.")
    return values

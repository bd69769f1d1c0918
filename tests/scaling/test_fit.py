"""The fit against known parameters, the paper's numbers, and a general optimizer."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.optimize import minimize

from fusedvlm.scaling import fit_power_law

M = np.array([1, 8, 16, 32, 64, 128, 256, 384, 512, 768], dtype=float)


@given(st.floats(0.01, 100), st.floats(-1, 1))
def test_exact_laws_are_recovered(c, alpha):
    fit = fit_power_law(M, c * M**-alpha, resamples=50)
    assert fit.c == pytest.approx(c, rel=1e-6)
    assert fit.alpha == pytest.approx(alpha, abs=1e-7)
    assert fit.alpha_interval == pytest.approx((alpha, alpha), abs=1e-6)
    np.testing.assert_allclose(fit.predict([2, 20]), c * np.array([2, 20.0]) ** -alpha, rtol=1e-6)


def test_same_optimum_as_bfgs():
    scores = 5 * M**0.2 * np.exp(np.random.default_rng(0).normal(0, 0.1, len(M)))

    def objective(parameters):
        log_c, alpha = parameters
        return np.mean((np.log(scores) - log_c + alpha * np.log(M)) ** 2)

    optimum = minimize(objective, [0.0, 0.0], method="BFGS").x
    fit = fit_power_law(M, scores)
    assert np.log(fit.c) == pytest.approx(optimum[0], abs=1e-5)
    assert fit.alpha == pytest.approx(optimum[1], abs=1e-5)
    assert fit.alpha_interval[0] < fit.alpha < fit.alpha_interval[1]
    assert fit.c_interval[0] < fit.c < fit.c_interval[1]
    assert 0 < fit.r2 < 1


# "Scaling Capability in Token Space", POPE overall with vision + question + queries, m = 1 ... 768.
PUBLISHED_POPE = [58.113, 77.749, 79.533, 81.232, 82.761, 84.016, 86.734, 85.254, 86.626, 86.977]


def test_the_papers_own_benchmark():
    """The paper's Table 1 states c = 65.197 and alpha = -0.0503 for these scores."""
    fit = fit_power_law(M, PUBLISHED_POPE)
    assert fit.c == pytest.approx(65.197, abs=5e-4)
    assert fit.alpha == pytest.approx(-0.0503, abs=5e-5)


def test_seed_decides_the_interval():
    scores = M**0.3 + np.random.default_rng(1).random(len(M))
    assert fit_power_law(M, scores, seed=1) == fit_power_law(M, scores, seed=1)
    assert fit_power_law(M, scores, seed=1).c_interval != fit_power_law(M, scores, seed=2).c_interval


@pytest.mark.parametrize(
    ("m", "scores", "message"),
    [
        ([1, 2], [0.5, 0.0], r"Point 1 \(m=2, score=0\) is not positive"),
        ([1, 2], [0.5, float("nan")], "Point 1"),
        ([0, 2], [0.5, 0.4], "Point 0"),
        ([4, 4], [0.5, 0.4], "two or more numbers of visual tokens"),
        ([1, 2], [0.5], "2 numbers of visual tokens for 1 scores"),
    ],
)
def test_impossible_points_are_named(m, scores, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(m, scores)

"""Closed forms against definitions, limits, domains, and simulated states with known correlations."""

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from fusedvlm.scaling.divergence.theory import Dependency, alpha_from_upsilon, first_without_bound, fit_lambda, upsilon

cosines = st.floats(-1, 1)
below_one = st.floats(-1, 0.999)
betas = st.floats(0.01, 5)


def constants(dependency, length):
    """Upsilon(1 ... length) by the definition, with a loop."""
    return [
        n * (1 - dependency.psi_eq) + (n * n - n) * (dependency.psi_aa - dependency.psi_ab)
        for n in range(1, length + 1)
    ]


@given(below_one, cosines, cosines)
def test_upsilon_of_one_token(psi_eq, psi_aa, psi_ab):
    assert Dependency(psi_eq, psi_aa, psi_ab).upsilon(1) == pytest.approx(1 - psi_eq)
    assert upsilon([psi_eq], [psi_aa], [psi_ab])[0] == pytest.approx(1 - psi_eq)


@given(below_one, cosines, cosines, st.floats(1, 2000))
def test_nothing_is_nan_inside_the_domain_and_outside_it_raises(psi_eq, psi_aa, psi_ab, n):
    dependency = Dependency(psi_eq, psi_aa, psi_ab)
    if n > dependency.max_tokens * 1.001:
        with pytest.raises(ValueError, match=r"bound is real only for n <="):
            dependency.upsilon(n)
        with pytest.raises(ValueError, match=r"bound is real only for n <="):
            dependency.alpha(n)
    elif n < dependency.max_tokens * 0.999:
        assert np.isfinite(dependency.upsilon(n))
        assert dependency.upsilon(n) >= 0
        assert np.isfinite(dependency.alpha(n))


@given(below_one, cosines, cosines, betas)
def test_closed_form_is_the_general_form(psi_eq, psi_aa, psi_ab, beta):
    dependency = Dependency(psi_eq, psi_aa, psi_ab)
    length = int(min(40, np.ceil(dependency.max_tokens) - 1))
    values = constants(dependency, length)
    assume(length >= 2 and min(values) > 1e-6)
    closed = dependency.alpha(np.arange(1, length + 1), beta)
    np.testing.assert_allclose(alpha_from_upsilon(values, beta), closed, rtol=1e-6, atol=1e-9)


@given(below_one, st.floats(1e-3, 1), betas, st.floats(1, 1e4), st.floats(1, 1e4))
def test_alpha_is_the_papers_formula_and_monotone_between_its_limits(psi_eq, delta, beta, n, other):
    dependency = Dependency(psi_eq, delta, 0.0)
    balance = dependency.n_balance
    assume(n > 1.001 and other > 1.001)
    paper = beta / 2 * np.log((1 + balance) / (n + balance)) / np.log(n) - beta / 2
    assert dependency.alpha(n, beta) == pytest.approx(paper, rel=1e-6, abs=1e-9)
    low, high = sorted((n, other))
    first, second = dependency.alpha([low, high], beta)
    if balance > 0:
        assert -beta * (1 + 1e-9) <= second <= first + 1e-12
        assert first <= -beta / 2 + 1e-12
    else:
        assert second >= first - 1e-12
        assert second <= -beta * (1 - 1e-9)


@given(below_one, cosines, betas, st.floats(1, 1e6))
def test_delta_zero_is_half_of_beta(psi_eq, psi, beta, n):
    dependency = Dependency(psi_eq, psi, psi)
    assert dependency.alpha(n, beta) == pytest.approx(-beta / 2)
    assert dependency.rho(n) == np.inf
    assert dependency.regime(n) == "sqrt"


@given(st.floats(-1, 0.9), st.floats(0.01, 1), betas)
def test_limits_of_alpha(psi_eq, delta, beta):
    dependency = Dependency(psi_eq, delta, 0.0)
    assert dependency.alpha(1e280, beta) == pytest.approx(-beta, rel=0.02)
    # The limit n -> 1 is continuous: no jump between 1 and just above it.
    assert dependency.alpha(1, beta) == pytest.approx(float(dependency.alpha(1 + 1e-9, beta)), rel=1e-6)
    assert dependency.alpha(1, beta) == pytest.approx(-beta / 2 * (1 + delta / (1 - psi_eq)))


@given(below_one, st.floats(1e-3, 1), st.floats(1, 1e5))
def test_rho_is_the_ratio_of_the_parts(psi_eq, delta, n):
    dependency = Dependency(psi_eq, delta, 0.0)
    linear, quadratic = n * (1 - psi_eq - delta), n**2 * delta
    assert dependency.rho(n) == pytest.approx(linear / quadratic, rel=1e-6, abs=1e-9)
    assert linear + quadratic == pytest.approx(float(dependency.upsilon(n)), rel=1e-9)
    assert dependency.regime(n) == ("sqrt" if linear > quadratic else "linear")


def test_rho_is_one_at_the_balance():
    dependency = Dependency(0.2, 0.5, 0.4)
    assert dependency.n_balance == pytest.approx(7)
    assert dependency.rho(dependency.n_balance) == pytest.approx(1)


def test_negative_delta():
    dependency = Dependency(0.5, 0.1, 0.2)
    assert dependency.max_tokens == pytest.approx(6)
    assert dependency.upsilon(6) == pytest.approx(0)
    assert dependency.regime(3) == "shrinking"
    with pytest.raises(ValueError, match=r"n=7 is outside the bound's domain\..*n <= 6"):
        dependency.upsilon([1, 7])
    with pytest.raises(ValueError, match=r"n_balance needs psi_aa >= psi_ab; delta is -0.1"):
        _ = dependency.n_balance


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Dependency(1.2, 0, 0), "psi_eq=1.2 is not a cosine"),
        (lambda: Dependency(float("nan"), 0, 0), "psi_eq=nan is not a cosine"),
        (lambda: Dependency(1, 0, 0), "both branches have the same states"),
        (lambda: Dependency(0, 0, 0).upsilon(0), "n counts tokens from 1; got 0"),
        (lambda: Dependency(0, 0, 0).alpha(2, beta=0), "beta=0"),
        (lambda: upsilon([0.1, 0.2], [0.1], [0.1]), "need one length"),
        (lambda: upsilon([0.1, np.nan], [0.1, 0], [0.1, 0]), "not finite at n=2"),
        (lambda: alpha_from_upsilon([1, -1]), r"Upsilon\(2\)=-1 is not positive; the bound holds only for n < 2"),
        (lambda: fit_lambda([1, 2], [1]), "2 distances for 1 values"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_measured_upsilon_reads_no_cross_cosine_at_one_token():
    values = upsilon([0.2, 0.3, 0.4], [99, 0.5, 0.6], [-99, 0.4, 0.2])
    np.testing.assert_allclose(values, [0.8, 2 * 0.7 + 2 * 0.1, 3 * 0.6 + 6 * 0.4])
    assert first_without_bound(values) is None
    assert first_without_bound([1, 0.5, -1]) == 3


@given(st.floats(0.1, 10), st.integers(1, 30))
def test_lambda_is_recovered_and_optimal(scale, length):
    values = Dependency(0.3, 0.4, 0.35).upsilon(np.arange(1, length + 1))
    assert fit_lambda(scale * np.sqrt(values), values) == pytest.approx(scale)
    noisy = scale * np.sqrt(values) + np.sin(np.arange(length))
    best = fit_lambda(noisy, values)

    def loss(candidate):
        return np.mean((noisy - candidate * np.sqrt(values)) ** 2)

    assert loss(best) <= min(loss(best * 1.01), loss(best * 0.99)) + 1e-12

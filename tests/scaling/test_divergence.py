"""Running sums against a direct double loop, known correlations, merging, and Definition 1."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fusedvlm.scaling.divergence.estimators import (
    BINS,
    CURVES,
    DivergenceResult,
    DivergenceStatistics,
    pair_curves,
    summarize,
)


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


def direct(a, b):
    """The definitions, with loops over n, i and j."""
    rows = []
    for n in range(1, len(a) + 1):
        positions = range(n)
        distance = np.linalg.norm(sum(a[i] - b[i] for i in positions))
        same = sum(cosine(a[i], b[i]) for i in positions) / n
        cross = [
            sum(cosine(x[i], y[j]) for i in positions for j in positions if i != j) / (n * (n - 1)) if n > 1 else 0
            for x, y in ((a, a), (b, b), (a, b))
        ]
        rows.append([distance, same, *cross])
    return dict(zip(CURVES, np.array(rows).T, strict=True))


def random_pair(seed, length=9, width=5):
    generator = np.random.default_rng(seed)
    common = generator.normal(size=width)
    return generator.normal(size=(length, width)) + common, generator.normal(size=(length, width)) + common


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 7))
def test_running_sums_are_the_definitions(seed, length, width):
    a, b = random_pair(seed, length, width)
    expected, curves = direct(a, b), pair_curves(a, b)
    for name in CURVES:
        np.testing.assert_allclose(curves[name], expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_nearly_equal_branches_keep_their_distance():
    """In half precision two branches may differ in the last bit only; the distance must not drown in rounding."""
    generator = np.random.default_rng(0)
    a = (1e3 + generator.normal(size=(50, 64))).astype(np.float32)
    b = a.copy()
    b[:, 0] += 1e-3
    np.testing.assert_allclose(
        pair_curves(a, b)["distance"], direct(a.astype(float), b.astype(float))["distance"], rtol=1e-9
    )
    assert (pair_curves(a, a)["distance"] == 0).all()
    np.testing.assert_allclose(pair_curves(a, a)["psi_eq"], 1)


def branches(generator, length, width, psi_eq, psi_aa, psi_ab, scale):
    """States with given expected cosines: parts shared by all, by a branch, by a position, and own noise."""

    def part(weight, *shape):
        return np.sqrt(weight) * generator.normal(size=(*shape, width)) / np.sqrt(width)

    everything = part(psi_ab, 1)
    position = part(psi_eq - psi_ab, length)
    return [
        scale * (everything + position + part(psi_aa - psi_ab, 1) + part(1 - psi_eq - psi_aa + psi_ab, length))
        for _ in range(2)
    ]


def test_known_correlations_and_lambda_are_recovered():
    """E||sum (h^A - h^B)||^2 = 2 scale^2 Upsilon(n) for states of norm `scale`, so lambda is scale sqrt(2)."""
    generator, scale = np.random.default_rng(0), 7.0
    statistics = DivergenceStatistics(40)
    for number in range(60):
        statistics.add(*branches(generator, 40, 2000, 0.35, 0.4, 0.2, scale), seed=number)
    result = summarize(statistics)
    assert np.mean(result.psi_eq) == pytest.approx(0.35, abs=0.01)
    assert result.psi_intra[-1] == pytest.approx(0.4, abs=0.01)
    assert result.psi_ab[-1] == pytest.approx(0.2, abs=0.01)
    assert result.lambda_ == pytest.approx(scale * np.sqrt(2), rel=0.02)
    assert result.n_balance == pytest.approx(0.65 / 0.2 - 1, rel=0.1)
    predicted = result.lambda_ * np.sqrt(result.upsilon)
    np.testing.assert_allclose(result.mean_distance, predicted, rtol=0.03)
    # alpha at the constants of the simulation, beta = 1
    n = 40
    exact = -0.5 * np.log((n * 0.65 + n * (n - 1) * 0.2) / 0.65) / np.log(n)
    assert result.alpha[-1] == pytest.approx(exact, abs=0.01)
    assert result.upsilon[0] == pytest.approx(1 - result.psi_eq[0])


def test_pairs_of_different_length_average_over_those_long_enough():
    statistics = DivergenceStatistics(6)
    pairs = [random_pair(seed, length) for seed, length in enumerate((3, 9, 5))]
    for pair in pairs:
        statistics.add(*pair)
    assert statistics.count.tolist() == [3, 3, 3, 2, 2, 1]
    result = summarize(statistics)
    curves = [pair_curves(*pair)["distance"] for pair in pairs]
    assert result.mean_distance[2] == pytest.approx(np.mean([c[2] for c in curves]))
    assert result.std_distance[2] == pytest.approx(np.std([c[2] for c in curves]))
    assert result.mean_distance[4] == pytest.approx(np.mean([curves[1][4], curves[2][4]]))
    assert len(summarize(statistics, min_pairs=2).count) == 5
    assert result.psi_ab[0] is None
    assert result.psi_aa[3] != pytest.approx(result.psi_bb[3], abs=1e-3)
    assert result.psi_intra[3] == pytest.approx((result.psi_aa[3] + result.psi_bb[3]) / 2)
    with pytest.raises(ValueError, match="No n has 4 pairs; 3 pairs were read"):
        summarize(statistics, min_pairs=4)


@pytest.mark.parametrize("reading", ["mean", "positive_part"])
def test_merging_equals_adding_everything_to_one(reading):
    whole, left, right = (DivergenceStatistics(7, reading) for _ in range(3))
    for seed in range(6):
        pair = random_pair(seed, 4 + seed)
        whole.add(*pair, seed=seed)
        (left if seed % 2 else right).add(*pair, seed=seed)
    left.merge(right)
    for name, values in whole.arrays().items():
        np.testing.assert_allclose(left.arrays()[name], values, rtol=1e-12, err_msg=name)
    with pytest.raises(ValueError, match="do not add up"):
        left.merge(DivergenceStatistics(8, reading))


def test_positive_part_is_definition_1():
    statistics = DivergenceStatistics(6, "positive_part")
    pairs = [random_pair(seed, 6) for seed in range(3)]
    for pair in pairs:
        statistics.add(*pair)
    result = summarize(statistics)
    n = 4
    worst = {(i, j): max(0, *(cosine(a[i], b[j]) for a, b in pairs)) for i in range(n) for j in range(n)}
    assert result.psi_eq[n - 1] == pytest.approx(np.mean([worst[i, i] for i in range(n)]), rel=1e-5)
    others = [worst[i, j] for i in range(n) for j in range(n) if i != j]
    assert result.psi_ab[n - 1] == pytest.approx(np.mean(others), rel=1e-5)


def test_histograms_count_cosines_of_their_kind():
    statistics = DivergenceStatistics(30)
    generator = np.random.default_rng(1)
    for seed in range(10):
        statistics.add(*branches(generator, 30, 3000, 0.6, 0.4, 0.1, 1.0), seed=seed)
    result = summarize(statistics)
    centers = (BINS[1:] + BINS[:-1]) / 2
    for name, expected in {"psi_eq": 0.6, "psi_aa": 0.4, "psi_bb": 0.4, "psi_ab": 0.1}.items():
        counts = np.array(result.histograms[name])
        assert counts @ centers / counts.sum() == pytest.approx(expected, abs=0.03)
    assert sum(result.histograms["psi_eq"]) == 300


def test_a_bound_that_breaks_is_cut_not_nan():
    generator = np.random.default_rng(2)
    statistics = DivergenceStatistics(30)
    a = generator.normal(size=(30, 4))
    signs = (-1.0) ** np.arange(30)[:, None]
    statistics.add(a * 0.01 + signs, a[::-1] * 0.01 - signs)  # states cancel within a branch: delta < 0
    result = summarize(statistics)
    assert result.tokens_with_bound < 30
    assert len(result.alpha) == result.tokens_with_bound
    assert result.n_balance is None
    assert np.isfinite(result.alpha).all()


def test_record_survives_json():
    import json

    statistics = DivergenceStatistics(5)
    statistics.add(*random_pair(0))
    result = summarize(statistics, beta=0.3)
    record = json.loads(json.dumps({"model": "x", **result.record()}, allow_nan=False))
    assert record["kind"] == "divergence"
    assert DivergenceResult.from_record(record) == result
    with pytest.raises(ValueError, match="no beta, lambda"):
        DivergenceResult.from_record({k: v for k, v in record.items() if k not in ("beta", "lambda")})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 3)), r"shapes \(2, 3\) and \(3, 3\)"),
        (np.ones((2, 3)), np.array([[1, 1, 1], [0, 0, 0]]), "State 1 of branch B has norm 0"),
        (np.array([[np.inf, 1]]), np.ones((1, 2)), "State 0 of branch A has norm inf.*float32"),
        (np.array([[np.nan, 1]]), np.ones((1, 2)), "State 0 of branch A has norm nan"),
    ],
)
def test_states_without_a_cosine_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        pair_curves(a, b)

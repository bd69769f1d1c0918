"""What figures show: points, hollow exclusions, fitted lines, frontiers; and that they leave pyplot alone."""

import sys

import numpy as np
import pytest

from fusedvlm import charts, scaling
from fusedvlm.scaling import fit_curve, fit_power_law, group_curves, read_grid, read_scores
from fusedvlm.scaling.divergence.estimators import DivergenceStatistics, summarize
from fusedvlm.scaling.laws.compare_curves import ModelScore
from fusedvlm.scaling.report import figures
from fusedvlm.scaling.tradeoff.fit_tradeoff import fit_tradeoff

M = [1, 8, 64, 512]


def line(axes, label):
    return next(entry for entry in axes.get_lines() if str(entry.get_label()).startswith(label))


@pytest.fixture(scope="module")
def result():
    generator = np.random.default_rng(0)
    statistics = DivergenceStatistics(12)
    for _ in range(4):
        statistics.add(*generator.normal(size=(2, 12, 16)) + generator.normal(size=(2, 1, 16)))
    return summarize(statistics, beta=0.5)


def test_scores_law_and_hollow_points():
    scores = [2 * m**0.3 for m in M]
    fit = fit_power_law(M, scores)
    axes = figures.score_against_m(M, scores, fit, [0.1] * 4, excluded=[(4, 9.0)], title="T").axes[0]
    law = next(entry for entry in axes.get_lines() if "R^2" in str(entry.get_label()))
    np.testing.assert_allclose(law.get_ydata(), 2 * law.get_xdata() ** 0.3, rtol=1e-6)
    hollow = line(axes, "left out")
    assert hollow.get_markerfacecolor() == "white"
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([4], [9.0])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "8", "64", "512"]
    assert axes.get_title() == "T"


def test_fitted_curves_give_every_benchmark_a_panel():
    curves = [
        c for c in group_curves(read_scores("paper"), ["benchmark=RealWorldQA,m=384|512"]) if c.metric == "Overall"
    ]
    fits = [fit_curve(curve, resamples=20) for curve in curves[:3]]
    figure = figures.fitted_curves(fits, columns=2)
    assert len(figure.axes) == 4
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    assert fits[0].curve.benchmark in figure.axes[0].get_title()
    assert f"{fits[0].power.alpha:.3f}" in figure.axes[0].get_title()


def test_divergence_figures_draw_the_record(result):
    named = {"tiny": result}
    axes = figures.bound_against_distance(named).axes[0]
    np.testing.assert_allclose(line(axes, "$E[D").get_ydata(), result.mean_distance)
    bound = line(axes, r"$\lambda").get_ydata()
    np.testing.assert_allclose(bound, result.lambda_ * np.sqrt(result.upsilon[: len(bound)]))
    axes = figures.psi_against_n(named).axes[0]
    drawn = line(axes, r"$\psi_{cross}^{AB}").get_ydata()
    assert np.isnan(drawn[0])
    np.testing.assert_allclose(drawn[1:], result.psi_ab[1:])
    axes = figures.alpha_against_n(named).axes[0]
    np.testing.assert_allclose(line(axes, "tiny").get_ydata() * 0.5, result.alpha)
    assert len(figures.intra_against_cross(named).axes[0].get_lines()) == 4
    assert len(figures.cosine_histograms(named).axes[0].patches) == 4


def test_tradeoff_frontier_falls_and_touches_the_fit():
    cells = read_grid()
    fit = fit_tradeoff(cells, text_tokens=50)
    right = figures.tradeoff_plot(cells, fit).axes[1]
    frontier = line(right, "best choice")
    cost, error = frontier.get_xdata(), frontier.get_ydata()
    assert (np.diff(cost) > 0).all()
    assert (np.diff(error) < 0).all()
    assert error[-1] == pytest.approx(float(fit.error(7, 576)))
    assert cost[0] == pytest.approx(2e9 * 0.5 * 51)


def test_radar_scales_each_benchmark_to_its_best():
    table = {"A": (80, 40), "B": (40, 50)}
    scores = [ModelScore(model, name, s) for model, row in table.items() for name, s in zip("xy", row, strict=True)]
    scores.append(ModelScore("A", "z", 7))
    axes = figures.radar(scores).axes[0]
    np.testing.assert_allclose(line(axes, "A").get_ydata(), [1, 0.8, 1, 1])
    np.testing.assert_allclose(line(axes, "B").get_ydata(), [0.5, 1, np.nan, 0.5])


def test_latency_starts_at_zero(tmp_path):
    figure = figures.latency_against_m(M, {"first token": [5, 6, 7, 8], "answer": [20, 21, 22, 25]})
    assert figure.axes[0].get_ylim()[0] == 0
    for ending in ("png", "svg", "pdf"):
        charts.save_figure(figure, tmp_path / f"latency.{ending}")
        assert (tmp_path / f"latency.{ending}").stat().st_size > 1000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_every_public_name_exists():
    for name in scaling.__all__:
        assert getattr(scaling, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scaling.nothing


def test_no_axis_of_scores_leaves_the_scores():
    """The bootstrap band of a steep law goes far beyond any score; the axis ends where the points do."""
    m, scores = [1, 2, 4, 8, 16, 32], [0.004, 0.041, 0.224, 0.428, 0.675, 0.888]
    figure = figures.score_against_m(m, scores, fit_power_law(m, scores), [0.01] * 6)
    low, high = figure.axes[0].get_ylim()
    assert 0.898 < high < 1.05
    assert -0.05 < low <= 0
    flat = figures.score_against_m(m, [0.99, 1.0, 1.0, 1.0, 1.0, 1.0], None).axes[0].get_ylim()
    assert 0.97 < flat[0] < 0.99
    assert flat[1] < 1.02

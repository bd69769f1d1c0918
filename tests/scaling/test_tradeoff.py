"""The published grid's golden numbers, recovery of known parameters, and budgets against brute force."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fusedvlm.scaling.tradeoff.fit_tradeoff import (
    GridCell,
    choices_for_budget,
    fit_tradeoff,
    optimal_visual_tokens,
    read_grid,
)

HEADER = "llm_params_b,num_visual_tokens,score\n"


@pytest.fixture(scope="module")
def published():
    return fit_tradeoff(read_grid())


def synthetic(a=0.6, alpha=0.2, beta=0.05, d=0.1, noise=0.0, text=0):
    generator = np.random.default_rng(0)
    return [
        GridCell(n, v, float(1 - (a * n**-alpha * (v + text) ** -beta + d) * np.exp(noise * generator.normal())))
        for n in (0.5, 2, 8)
        for v in (1, 4, 16, 64, 256)
    ]


def test_the_published_grid(published):
    assert len(read_grid()) == 28
    assert published.alpha == pytest.approx(0.0709, abs=5e-5)
    assert published.beta == pytest.approx(0.0151, abs=5e-5)
    assert published.d == 0
    assert published.squared_error == pytest.approx(3.79e-4, rel=2e-3)
    assert "lower bound" in published.warnings[0]
    low, high = published.intervals["alpha"]
    assert low < 0.0709 < 0.077 < high  # the alpha they report lies inside
    assert published.intervals["d"][0] == 0


def test_golden_visual_tokens(published):
    assert optimal_visual_tokens(published, 0) == 1
    assert optimal_visual_tokens(published, 50) == 14


def test_optimal_tokens_against_numerical_minimum(published):
    for text_tokens in (20, 50, 200):

        def error(log_v, q=text_tokens):
            return published.error(1 / (q + np.exp(log_v)), np.exp(log_v))

        best = np.exp(minimize_scalar(error, bounds=(-3, 7), method="bounded").x)
        assert optimal_visual_tokens(published, text_tokens) == round(best)


def test_the_other_convention():
    fit = fit_tradeoff(read_grid(), "vision+text", 50)
    assert fit.beta > 0.03  # the text tokens flatten T, so the exponent doubles
    assert optimal_visual_tokens(fit, 50) == 1
    exact = fit_tradeoff(synthetic(text=50), "vision+text", 50)
    assert (exact.alpha, exact.beta, exact.d) == pytest.approx((0.2, 0.05, 0.1), abs=1e-4)


def test_known_parameters_are_recovered():
    fit = fit_tradeoff(synthetic())
    assert (fit.a, fit.alpha, fit.beta, fit.d) == pytest.approx((0.6, 0.2, 0.05, 0.1), abs=1e-4)
    assert not fit.warnings
    noisy = fit_tradeoff(synthetic(noise=0.003))
    for name, truth in {"a": 0.6, "alpha": 0.2, "beta": 0.05, "d": 0.1}.items():
        low, high = noisy.intervals[name]
        assert low <= truth <= high
        assert low <= getattr(noisy, name) <= high


def test_profile_interval_against_a_grid_search(published):
    """On the ends of the interval of alpha the best squared error equals the F threshold, by a brute-force search."""
    from scipy.stats import f

    limit = published.squared_error * (1 + f.ppf(0.95, 1, 24) / 24)
    cells = read_grid()
    n, v, y = (
        np.array(x, dtype=float)
        for x in zip(*[(c.llm_params_b, c.num_visual_tokens, 1 - c.score) for c in cells], strict=True)
    )
    for alpha in published.intervals["alpha"]:
        best = np.inf
        for beta in np.linspace(0.005, 0.04, 351):
            basis = n**-alpha * v**-beta
            for d in np.linspace(0, 0.3, 301):
                a = basis @ (y - d) / (basis @ basis)
                best = min(best, ((a * basis + d - y) ** 2).sum())
        assert best == pytest.approx(limit, rel=5e-3)


def test_ocr_cells_want_tokens_not_parameters():
    cells = read_grid(task="ocr")
    assert len(cells) == 26
    fit = fit_tradeoff(cells)
    assert fit.beta > fit.alpha
    assert optimal_visual_tokens(fit, 50, max_visual_tokens=576) == 576


def test_budget_choices_respect_the_budget(published):
    choices = choices_for_budget(published, 1e12, [0.5, 1.8, 4, 7], text_tokens=50)
    assert [choice.error for choice in choices] == sorted(choice.error for choice in choices)
    for choice in choices:
        assert choice.flops <= 1e12
        dearer = 2e9 * choice.llm_params_b * (50 + choice.num_visual_tokens + 1)
        assert dearer > 1e12 or choice.num_visual_tokens == 576
    assert choices[0].llm_params_b == 7
    assert choices[0].num_visual_tokens == 21
    with pytest.raises(ValueError, match=r"buys no visual token; the least is 5\.1e"):
        choices_for_budget(published, 1e9, [0.5, 7], text_tokens=50)


def test_repeated_cells_are_flagged():
    cells = synthetic()
    cells[9] = GridCell(2, 256, cells[14].score, "row 11")
    assert any("repeats the score" in warning and "N=2" in warning for warning in fit_tradeoff(cells).warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llm_params_b,score\n1,0.5\n", "no column num_visual_tokens"),
        (HEADER + "1,4,50\n", r"row 2: .*score=50; .*divide per cent by 100"),
        (HEADER + "1,4,0.5\n1,4,0.6\n", "row 3: duplicate of row 2"),
        (HEADER + "1,x,0.5\n", r"row 2: .*not a number"),
        (HEADER + "0,4,0.5\n", "row 2: llm_params_b=0"),
    ],
)
def test_bad_grids_are_named(tmp_path, text, message):
    path = tmp_path / "grid.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_grid(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_tradeoff(synthetic()[:5]), "5 cells over 1 LLMs"),
        (lambda: fit_tradeoff(synthetic(), "text"), "Unknown convention 'text'"),
        (lambda: fit_tradeoff(synthetic(), d_bounds=(0.3, 0)), "not in order"),
        (lambda: fit_tradeoff(synthetic(), d_bounds=(0.9, 1)), "smallest error is"),
        (lambda: read_grid(task="poetry"), "no task 'poetry'; there are ocr, reasoning"),
    ],
)
def test_impossible_fits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_standard_errors_weigh_the_cells_and_judge_the_law(tmp_path):
    exact = [replace(cell, standard_error=0.004) for cell in synthetic()]
    fit = fit_tradeoff(exact)
    assert fit.verdict == "holds"
    assert (fit.alpha, fit.beta) == (pytest.approx(0.2, abs=1e-3), pytest.approx(0.05, abs=1e-3))
    off = replace(exact[3], score=exact[3].score - 0.1)
    doubtful = fit_tradeoff([*exact[:3], replace(off, standard_error=10.0), *exact[4:]])
    assert doubtful.alpha == pytest.approx(fit.alpha, abs=2e-3)  # what nobody knows moves nothing
    wrong = fit_tradeoff([*exact[:3], off, *exact[4:]])
    assert wrong.verdict.startswith("rejected (z up to ")
    z = [
        (1 - c.score - wrong.error(c.llm_params_b, c.num_visual_tokens)) / 0.004 for c in [*exact[:3], off, *exact[4:]]
    ]
    assert wrong.goodness.value == pytest.approx(np.square(z).sum())
    assert wrong.goodness.degrees == 15 - 4
    table = tmp_path / "grid.csv"
    rows = [f"{c.llm_params_b},{c.num_visual_tokens},{c.score},{c.standard_error}" for c in exact]
    table.write_text("llm_params_b,num_visual_tokens,score,standard_error\n" + "\n".join(rows))
    assert fit_tradeoff(read_grid(table)).goodness == fit.goodness
    table.write_text(table.read_text().replace("0.004", "0", 1))
    with pytest.raises(ValueError, match="row 2: standard_error=0 is not positive"):
        read_grid(table)
    assert fit_tradeoff(synthetic()).verdict == "not tested: no standard errors"

"""Standard errors weigh the points of a fit, and say whether a law holds."""

import json

import numpy as np
import pytest
from scipy import optimize, stats
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.scaling import fit_curve, fit_law, fit_power_law, group_curves, read_scores
from fusedvlm.scaling.laws.law_forms import LAWS, rank_laws
from fusedvlm.scaling.report.text_tables import fit_document, fit_table
from fusedvlm.scaling.score_records import read_trainings

M = np.array([1, 2, 4, 8, 16, 32, 64])
ERRORS = np.array([0.02, 0.01, 0.01, 0.03, 0.005, 0.01, 0.02])


def curve(tmp_path, rows, name="scores.csv", header="benchmark,metric,m,score,standard_error"):
    path = tmp_path / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return group_curves(read_scores(path))


def noisy(law, parameters, seed):
    truth = LAWS[law].predict(M.astype(float), **parameters)
    return truth + ERRORS * np.random.default_rng(seed).normal(size=len(M))


def test_a_weighted_power_law_is_what_a_general_optimizer_finds():
    scores = noisy("power", {"c": 0.4, "alpha": -0.15}, 0)

    def residuals(x):
        return (x[0] - x[1] * np.log(M) - np.log(scores)) * scores / ERRORS

    expected = optimize.least_squares(residuals, [-1.0, 0.0], xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    fit = fit_law("power", M, scores, ERRORS)
    assert [np.log(fit.parameters["c"]), fit.parameters["alpha"]] == pytest.approx(expected, abs=1e-7)
    z = (scores - fit.predict(M)) / ERRORS
    assert fit.chi_square == pytest.approx((z**2).sum())
    assert fit.p_value == pytest.approx(stats.chi2.sf(fit.chi_square, len(M) - 2))
    assert abs(fit.largest_z) == pytest.approx(np.abs(z).max())


@pytest.mark.parametrize("law", LAWS)
def test_equal_relative_errors_change_no_parameter(law):
    scores = noisy("saturating", {"s_inf": 0.9, "a": 0.5, "b": 0.6}, 1)
    plain, weighed = fit_law(law, M, scores), fit_law(law, M, scores, 0.01 * scores)
    assert list(weighed.parameters.values()) == pytest.approx(list(plain.parameters.values()), rel=1e-4)
    assert plain.chi_square is None
    assert plain.is_rejected is None


def test_the_true_law_is_rejected_about_as_often_as_it_should_be_and_a_wrong_one_nearly_always():
    true = {"s_inf": 0.9, "a": 0.6, "b": 0.7}
    fits = [rank_laws(M, noisy("saturating", true, seed), ERRORS) for seed in range(60)]
    rejected = {law: sum(next(f for f in fit if f.law == law).is_rejected for fit in fits) for law in LAWS}
    assert rejected["saturating"] <= 4  # 1 % of 60, and some luck
    assert rejected["power"] >= 55
    assert all(fit[0].law == "saturating" for fit in fits[:20])


def test_r2_is_high_where_the_law_is_rejected(tmp_path):
    scores = LAWS["saturating"].predict(M.astype(float), s_inf=0.9, a=0.6, b=0.3)
    (found,) = curve(tmp_path, [f"A,acc,{m},{s:.6f},0.002" for m, s in zip(M, scores, strict=True)])
    fit = fit_curve(found, resamples=50)
    assert fit.power.r2 > 0.8
    assert fit.verdict.startswith("power rejected (z up to")
    assert fit.verdict.endswith("saturating holds")
    assert fit.power.lack_of_fit > 5
    assert "power rejected" in fit_table([fit])
    record = fit_document("x", [fit])["fits"][0]
    assert record["standard_error"] == [0.002] * len(M)
    assert record["laws"][0]["is_rejected"] is False


def test_alpha_error_is_the_spread_that_sampling_makes():
    alphas = [
        fit_power_law(M, noisy("power", {"c": 0.4, "alpha": -0.1}, seed), resamples=20, errors=ERRORS).alpha
        for seed in range(200)
    ]
    fit = fit_power_law(M, noisy("power", {"c": 0.4, "alpha": -0.1}, 7), resamples=20, errors=ERRORS)
    assert fit.alpha_error == pytest.approx(np.std(alphas), rel=0.2)


def test_without_errors_everything_is_as_before(tmp_path):
    (found,) = curve(tmp_path, [f"A,acc,{m},{0.3 * m**0.1}" for m in M], header="benchmark,metric,m,score")
    fit = fit_curve(found, resamples=50)
    assert found.errors is None
    assert fit.power.alpha_error is None
    assert fit.verdict == "not tested: no standard errors"
    assert "standard errors say" not in fit_table([fit])


def test_a_curve_whose_errors_are_not_all_stated_is_not_weighed(tmp_path):
    (found,) = curve(tmp_path, ["A,acc,1,0.2,0.01", "A,acc,2,0.3,", "A,acc,4,0.4,0.01"])
    assert found.errors is None


def test_scores_without_spread_are_not_known_exactly(tmp_path):
    rows = [{"task": "A", "num_visual_tokens": m, "score": 1.0, "count": 256, "standard_error": 0.0} for m in (1, 2, 4)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"scores": rows}))
    (found,) = group_curves(read_scores(path))
    assert found.errors == pytest.approx([np.sqrt(257 / 258 * (1 / 258) / 256)] * 3)


@pytest.mark.parametrize(("error", "said"), [("x", "not a number"), ("-1", "zero or more"), ("nan", "zero or more")])
def test_wrong_errors_are_named(tmp_path, error, said):
    with pytest.raises(ValueError, match=rf"row 2: standard_error is .*{said}"):
        curve(tmp_path, [f"A,acc,1,0.2,{error}", "A,acc,2,0.3,0.1"])
    with pytest.raises(ValueError, match="Point 1 has the standard error 0; it would decide the fit alone"):
        fit_law("power", [1, 2, 4], [1, 2, 3], [0.1, 0, 0.1])


def test_the_spread_over_seeds_stands_beside_what_sampling_explains(tmp_path):
    rows = [f"A,acc,{seed},{m},{0.3 * m ** (0.1 + 0.05 * seed):.6f},0.001" for seed in range(3) for m in (1, 2, 4, 8)]
    curves = curve(tmp_path, rows, header="benchmark,metric,seed,m,score,standard_error")
    text = fit_table([fit_curve(found, resamples=20) for found in curves])
    assert "A/acc: alpha -0.1500, standard deviation over 3 seeds 0.0500; sampling alone" in text


def test_several_files_are_several_trainings(tmp_path):
    for number in range(3):
        (tmp_path / f"seed{number}").mkdir()
        rows = [f"A,acc,{m},{0.3 * m ** (0.1 + 0.05 * number):.6f},0.001" for m in (1, 2, 4, 8)]
        (tmp_path / f"seed{number}" / "scores.csv").write_text(
            "\n".join(["benchmark,metric,m,score,standard_error", *rows])
        )
    files = [str(tmp_path / f"seed{number}" / "scores.csv") for number in range(3)]
    result = CliRunner().invoke(app, ["scaling", "fit", *files, "--resamples", "20"])
    assert result.exit_code == 0, result.exception
    assert "A/acc (seed1)" in result.stdout
    assert "A/acc: alpha -0.1500, standard deviation over 3 seeds 0.0500; sampling alone" in result.stdout
    with pytest.raises(ValueError, match="is named twice"):
        read_trainings([files[0], files[0]])
    assert read_trainings(files[:1]) == read_scores(files[0])
    with_seed = tmp_path / "with.csv"
    with_seed.write_text("benchmark,metric,seed,m,score\nA,acc,0,1,0.3\nA,acc,0,2,0.4\n")
    with pytest.raises(ValueError, match="has a column seed already"):
        read_trainings([files[0], with_seed])

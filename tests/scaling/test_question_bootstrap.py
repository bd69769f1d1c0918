"""The bootstrap over questions: against the plain loop, from a file, and narrower where questions repeat at every m."""

import numpy as np
import pytest

from fusedvlm.evaluation import EvaluationResults, describe_environment, summarize
from fusedvlm.scaling import Curve, ScoreRecord, fit_curve, fit_power_law, group_curves, read_scores
from fusedvlm.scaling.laws.fit import bootstrap_questions
from fusedvlm.scaling.report.scaling_report import collect, write_report

M = (1, 2, 4, 8)


def answers(questions: int = 200, seed: int = 0) -> np.ndarray:
    """(m, questions) right or wrong: a question answered at m is answered at every larger one."""
    difficulty = np.random.default_rng(seed).random(questions)
    return np.array([(difficulty < 0.3 * m**0.4).astype(float) for m in M])


def test_it_equals_a_plain_loop_over_resampled_questions():
    scores = answers()
    _, alphas = bootstrap_questions(M, scores, resamples=5, seed=3)
    drawn = np.random.default_rng(3).multinomial(200, [1 / 200] * 200, 5)
    for alpha, counts in zip(alphas, drawn, strict=True):
        again = np.repeat(scores, counts, axis=1)
        assert fit_power_law(M, again.mean(1), resamples=10).alpha == pytest.approx(alpha, abs=1e-12)


def test_resamples_without_a_right_answer_are_left_out_and_too_few_give_no_interval():
    scores = answers()
    scores[0] = 0
    scores[0, 0] = 1  # one question in 200: absent from a third of the resamples
    _, alphas = bootstrap_questions(M, scores, resamples=300)
    assert 0.5 * 300 < len(alphas) < 0.8 * 300
    points = tuple(
        ScoreRecord("list", "score", m, row.mean(), question_scores=tuple(row))
        for m, row in zip(M, scores, strict=True)
    )
    assert fit_curve(Curve("list", "score", (), points), resamples=300).power.alpha_question_interval is None


def test_a_results_file_gives_its_questions_to_the_fit(tmp_path):
    scores = answers()
    results = EvaluationResults(
        describe_environment("test"), [summarize("list", m, r) for m, r in zip(M, scores, strict=True)]
    )
    results.question_scores = {"list": {m: row.tolist() for m, row in zip(M, scores, strict=True)}}
    results.save(tmp_path / "results.json")
    (curve,) = group_curves(read_scores(tmp_path / "results.json"))
    assert np.array_equal(curve.question_scores, scores)
    fit = fit_curve(curve, resamples=400)
    low, high = fit.power.alpha_question_interval
    assert low < fit.power.alpha < high
    # What the questions have in common at all m cancels: less is left open than independent errors would leave.
    assert (high - low) / 3.92 < fit.power.alpha_error
    assert fit.record()["alpha_question_interval"] == (low, high)


def test_reports_show_the_interval_over_questions(tmp_path):
    scores = answers()
    rows = [summarize("list", m, row) for m, row in zip(M, scores, strict=True)]
    results = EvaluationResults(describe_environment("test"), rows)
    results.question_scores = {"list": {m: row.tolist() for m, row in zip(M, scores, strict=True)}}
    results.save(tmp_path / "results.json")
    write_report(collect(tmp_path), tmp_path / "scaling.html", resamples=100)
    page = (tmp_path / "scaling.html").read_text()
    assert "<th>alpha over questions</th>" in page
    assert "results.questions.json" not in page  # it is no source of its own, and not left out either

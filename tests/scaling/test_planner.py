"""Plans against brute force over the options, choice of the LLM, and mistakes in budgets and files."""

import json

import numpy as np
import pytest

from fusedvlm.scaling.tradeoff.planner import Budget, Cost, make_plan, parse_budget, read_costs, read_curves

M = [1, 8, 32, 128, 512]
HEADER = "benchmark,metric,llm,m,score\n"


def write_scores(tmp_path, laws):
    """laws: {(benchmark, llm): (c, exponent)}."""
    lines = [f"{b},acc,{llm},{m},{c * m**e}\n" for (b, llm), (c, e) in laws.items() for m in M]
    path = tmp_path / "scores.csv"
    path.write_text(HEADER + "".join(lines))
    return path


@pytest.mark.parametrize(
    ("text", "amount", "field"),
    [
        ("2 TFLOPs", 2, "tflops"),
        ("500 gflops", 0.5, "tflops"),
        ("1.5e3 GFLOP", 1.5, "tflops"),
        ("150 ms", 150, "latency_ms"),
        ("0.2s", 200, "latency_ms"),
    ],
)
def test_budgets(text, amount, field):
    budget = parse_budget(text)
    assert budget.amount == pytest.approx(amount)
    assert budget.field == field


@pytest.mark.parametrize("text", ["2", "two TFLOPs", "2 apples", "0 ms", "-1 ms", "inf ms", ""])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="is not understood; write for instance '2 TFLOPs'"):
        parse_budget(text)


def test_largest_affordable_m_and_its_loss(tmp_path):
    path = write_scores(tmp_path, {("A", "x"): (10, 0.2), ("B", "x"): (0.5, 0.1)})
    costs = [Cost(m, float(m)) for m in M]
    plan = make_plan(read_curves(path, "", ["A", "B"]), costs, Budget(100, "tflops"), resamples=50)
    assert (plan.cheaper.num_visual_tokens, plan.best.num_visual_tokens, plan.dearer.num_visual_tokens) == (8, 32, 128)
    assert plan.reference.num_visual_tokens == 512
    assert plan.reference.loss == pytest.approx(0)
    expected = 1 - np.mean([(32 / 512) ** 0.2, (32 / 512) ** 0.1])
    assert plan.best.loss == pytest.approx(expected, rel=1e-6)
    assert plan.best.loss_interval == pytest.approx((expected, expected), rel=1e-3)  # no noise, no width
    assert plan.best.predicted == pytest.approx({"A/acc": 10 * 32**0.2, "B/acc": 0.5 * 32**0.1})


def test_metrics_of_one_benchmark_share_its_weight(tmp_path):
    path = tmp_path / "scores.csv"
    rows = [f"{b},{k},{m},{10 * m**e}\n" for b, k, e in (("A", "x", 0.2), ("A", "y", 0.2), ("B", "x", 0.1)) for m in M]
    path.write_text("benchmark,metric,m,score\n" + "".join(rows))
    plan = make_plan(read_curves(path, "", ["A", "B"]), [Cost(m, m) for m in M], Budget(9, "tflops"), resamples=20)
    assert plan.best.relative_score == pytest.approx(np.mean([(8 / 512) ** 0.2, (8 / 512) ** 0.1]))


def test_the_llm_is_chosen_by_brute_force(tmp_path):
    laws = {("A", "small"): (10, 0.2), ("A", "large"): (14, 0.15), ("B", "small"): (5, 0.3), ("B", "large"): (6, 0.28)}
    curves = read_curves(write_scores(tmp_path, laws), "", ["A", "B"])
    costs = [Cost(m, (1 if llm == "small" else 4) * (20 + m), llm) for llm in ("small", "large") for m in M]
    for amount in (50, 90, 130, 300, 700, 5000):
        plan = make_plan(curves, costs, Budget(amount, "tflops"), resamples=20)
        # At m = 512 the large LLM scores 35.7 and 34.4, the small one 34.8 and 32.5.
        assert (plan.reference.llm, plan.reference.num_visual_tokens) == ("large", 512)
        ends = {b: laws[b, plan.reference.llm][0] * 512 ** laws[b, plan.reference.llm][1] for b in "AB"}

        def relative(cost, ends=ends):
            return np.mean(
                [laws[b, cost.llm][0] * cost.num_visual_tokens ** laws[b, cost.llm][1] / ends[b] for b in "AB"]
            )

        best = max((cost for cost in costs if cost.amount <= amount), key=relative)
        assert (plan.best.llm, plan.best.num_visual_tokens) == (best.llm, best.num_visual_tokens)
        assert plan.best.relative_score == pytest.approx(relative(best), rel=1e-5)


def test_noise_widens_the_interval_around_the_loss(tmp_path):
    generator = np.random.default_rng(0)
    rows = [f"A,acc,{m},{10 * m**0.2 * np.exp(generator.normal(0, 0.1))}\n" for m in [*M, 2, 4, 16, 64, 256]]
    path = tmp_path / "scores.csv"
    path.write_text("benchmark,metric,m,score\n" + "".join(rows))
    plan = make_plan(read_curves(path, "", ["A"]), [Cost(m, m) for m in M], Budget(40, "tflops"), resamples=100)
    low, high = plan.best.loss_interval
    assert low < plan.best.loss < high
    assert high - low > 0.02
    assert not plan.best.extrapolated


def test_extrapolation_is_said(tmp_path):
    curves = read_curves(write_scores(tmp_path, {("A", "x"): (10, 0.2)}), "", ["A"])
    assert make_plan(curves, [Cost(4, 1), Cost(900, 2)], Budget(5, "tflops"), resamples=20).best.extrapolated


def test_the_papers_tasks_and_fit_documents(tmp_path):
    groups = ["fusion_inputs=vision+question+queries"]
    curves = read_curves("paper", "ocr", groups=groups)
    assert {c.benchmark for c in curves} == {"OCRBench", "OCRVQA_TESTCORE", "TextVQA_VAL", "ChartQA_TEST"}
    from fusedvlm.scaling import fit_curve
    from fusedvlm.scaling.report.text_tables import fit_document

    document = tmp_path / "fits.json"
    document.write_text(json.dumps(fit_document("paper", [fit_curve(curve, resamples=20) for curve in curves])))
    again = read_curves(document, "ocr")
    assert [(c.name, c.m, c.scores) for c in again] == [(c.name, c.m, c.scores) for c in curves]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read_curves("paper", "ocr"), "several fusion_inputs: .*Select one with fusion_inputs=VALUE"),
        (lambda: read_curves("paper", "poetry"), "Unknown task 'poetry'; tasks are ocr, reasoning, caption"),
        (lambda: read_curves("paper", "ocr", ["GQA"]), "No scores of GQA in paper; its benchmarks are AI2D_TEST"),
        (lambda: read_curves("paper", "ocr", groups=["fusion_inputs=x"]), "selects nothing; .*values of fusion_inputs"),
    ],
)
def test_selections_that_match_nothing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unaffordable_budgets_and_unknown_llms(tmp_path):
    curves = read_curves(write_scores(tmp_path, {("A", "x"): (10, 0.2), ("A", "y"): (11, 0.2)}), "", ["A"])
    with pytest.raises(ValueError, match=r"Costs name the LLM z; the scores have x, y"):
        make_plan(curves, [Cost(4, 1, "z")], Budget(5, "tflops"))
    with pytest.raises(ValueError, match=r"A budget of 0\.5 TFLOPs buys nothing; the cheapest is m=4 at 1 TFLOPs"):
        make_plan(curves, [Cost(8, 3, "x"), Cost(4, 1, "x")], Budget(0.5, "tflops"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a list"),
        ('[{"num_visual_tokens": 4}]', "row 1: no tflops; the budget is in tflops"),
        ('[{"num_visual_tokens": 4, "tflops": 0}]', "row 1: .* must be positive"),
        (
            '[{"num_visual_tokens": 4, "tflops": 1}, {"num_visual_tokens": 4, "tflops": 2}]',
            "row 2: a second cost of m=4",
        ),
    ],
)
def test_bad_costs_are_named(tmp_path, rows, message):
    path = tmp_path / "costs.json"
    path.write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_costs(path, "tflops")

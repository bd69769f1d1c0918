"""What the commands print: JSON-ready documents and short tables for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean, stdev

from fusedvlm.scaling.divergence.estimators import DivergenceResult
from fusedvlm.scaling.laws.fit import CurveFit
from fusedvlm.scaling.score_records import Curve
from fusedvlm.scaling.tradeoff.fit_tradeoff import Choice, TradeoffFit
from fusedvlm.scaling.tradeoff.planner import Cost, Option, Plan

SCOPES = {"llm": ("prefill",), "fusion": ("fusion", "prefill"), "all": ("vision", "fusion", "prefill")}


def fit_document(source: str, fits: Sequence[CurveFit]) -> dict:
    """The document of `scaling fit --json`; `plan --fits` reads it back."""
    grouping = [name for name, _ in fits[0].curve.groups]
    return {"kind": "fits", "source": source, "grouping": grouping, "fits": [fit.record() for fit in fits]}


def fit_table(fits: Sequence[CurveFit]) -> str:
    """One line per curve."""
    width = max(len(fit.curve.name) for fit in fits)
    with_verdict = any(fit.curve.errors is not None for fit in fits)
    over_questions = any(fit.power.alpha_question_interval is not None for fit in fits)
    lines = [
        f"{'benchmark/metric':<{width}}  {'c':>9}  {'alpha':>7}  {'interval of alpha':>18}  {'R2':>5}  {'n':>3}  "
        f"best law (dAICc of power, held-out error){'; what the standard errors say' if with_verdict else ''}"
        f"{'; interval of alpha over questions' if over_questions else ''}"
    ]
    for fit in fits:
        power, best = fit.power, fit.laws[0]
        behind = next(law.aicc for law in fit.laws if law.law == "power")
        gap = "" if behind is None or best.aicc is None else f"{behind - best.aicc:.1f}, "
        held_out = next((f"{error.rms:.1%}" for error in fit.held_out if error.law == best.law), "not possible")
        interval = "two points" if power.alpha_interval is None else "[{:.3f}, {:.3f}]".format(*power.alpha_interval)
        lines.append(
            f"{fit.curve.name:<{width}}  {power.c:>9.3f}  {power.alpha:>7.4f}  {interval:>18}  {power.r2:>5.2f}  "
            f"{power.n:>3}  {best.law} ({gap}{held_out}){'; ' + fit.verdict if with_verdict else ''}"
            + ("; [{:.3f}, {:.3f}]".format(*single) if (single := power.alpha_question_interval) else "")
        )
    return "\n".join([*lines, *_seed_lines(fits)])


def _seed_lines(fits: Sequence[CurveFit]) -> list[str]:
    """Spread of alpha over trainings, where a column `seed` tells them apart, beside what sampling leaves open."""
    by_rest: dict[str, list[CurveFit]] = {}
    for fit in fits:
        rest = tuple((name, value) for name, value in fit.curve.groups if name != "seed")
        if len(rest) < len(fit.curve.groups):
            by_rest.setdefault(replace(fit.curve, groups=rest).name, []).append(fit)
    lines = []
    for name, members in by_rest.items():
        alphas = [fit.power.alpha for fit in members]
        if len(alphas) > 1:
            errors = [fit.power.alpha_error for fit in members if fit.power.alpha_error is not None]
            sampling = f"; sampling alone {max(errors):.3f}" if errors else ""
            spread = f"standard deviation over {len(alphas)} seeds {stdev(alphas):.4f}"
            lines.append(f"{name}: alpha {mean(alphas):.4f}, {spread}{sampling}")
    return lines


def _intra(intra: float | None, across: float | None) -> str:
    if intra is None or across is None:
        return ""
    return f", psi_intra = {intra:.4f}, psi_ab = {across:.4f}, delta = {intra - across:.4f}"


def divergence_text(result: DivergenceResult) -> str:
    """The measurement in a few lines."""
    last, valid = len(result.count), result.tokens_with_bound
    intra, across = result.psi_intra[-1], result.psi_ab[-1]
    lines = [
        f"{result.pairs} pairs, n = 1 ... {last} ({result.count[-1]} pairs at the end), reading: {result.reading}",
        f"E[D({last})] = {result.mean_distance[-1]:.4g} +- {result.std_distance[-1]:.3g}",
        f"psi_eq = {result.psi_eq[-1]:.4f}" + _intra(intra, across),
    ]
    if valid < last:
        lines.append(f"The bound is real only for n <= {valid}; lambda and alpha are given there.")
    if valid:
        balance = "none (no positive quadratic part)" if result.n_balance is None else f"{result.n_balance:.1f}"
        lines.append(f"lambda = {result.lambda_:.4g}, n_balance = {balance}")
        lines.append(f"alpha({valid}) = {result.alpha[-1]:.4f} for beta = {result.beta:g}")
    return "\n".join(lines)


def tradeoff_text(fit: TradeoffFit, best: int, choices: Sequence[Choice]) -> str:
    """Fit, best V, and the choices within the budget."""
    lines = ["error = A / (N^alpha T^beta) + D, N in 1e9 parameters, T = " + fit.convention]
    for name, symbol in (("a", "A"), ("alpha", "alpha"), ("beta", "beta"), ("d", "D")):
        low, high = fit.intervals[name]
        lines.append(f"  {symbol:<5} {getattr(fit, name):.4f}  {fit.confidence:.0%} profile [{low:.4f}, {high:.4f}]")
    lines.append(f"  sum of squared errors {fit.squared_error:.3e} over {fit.n} cells")
    lines.append(f"Best number of visual tokens with Q = {fit.text_tokens} text tokens, LLM size free: {best}")
    for choice in choices:
        lines.append(
            f"  {choice.llm_params_b:g}B with V = {choice.num_visual_tokens}: predicted error {choice.error:.4f}, "
            f"{choice.flops / 1e12:.3g} TFLOPs"
        )
    return "\n".join(lines)


def plan_document(plan: Plan, task: str, source: str, scope: str | None) -> dict:
    """The document of `plan --json`."""
    return {"kind": "plan", "task": task, "fits": source, "scope": scope, **asdict(plan)}


def plan_text(plan: Plan, scope: str | None) -> str:
    """The choice, its neighbors, and what it gives up."""
    parts = "" if scope is None else f" ({' + '.join(SCOPES[scope])} counted)"
    lines = [f"Budget {plan.budget.text}{parts}"]
    unit = plan.budget.text.split()[-1]
    for name, option in (("choose", plan.best), ("cheaper", plan.cheaper), ("dearer", plan.dearer)):
        lines.append(f"  {name:<8}{'none' if option is None else _option(option, unit)}")
    reference = plan.reference
    llm = "" if reference.llm is None else f" of {reference.llm}"
    lines.append(
        f"  loss is against m = {reference.num_visual_tokens}{llm}, mean over {len(plan.best.predicted)} metrics"
    )
    for name, score in plan.best.predicted.items():
        lines.append(f"    {name}: predicted {score:.4g}, {reference.predicted[name]:.4g} there")
    return "\n".join(lines)


def counted_costs(curves: Sequence[Curve], scope: str, views: int, text_tokens: int) -> list[Cost]:
    """FLOPs of the paper's shapes at every m of the curves.

    Raises:
        ValueError: unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"Unknown scope {scope!r}; scopes are {', '.join(SCOPES)}.")
    from fusedvlm.costs.counts import count_flops, read_shapes
    from fusedvlm.modeling_fusedvlm import FusedVLMConfig

    shapes = read_shapes(FusedVLMConfig())
    costs = []
    for m in sorted({m for curve in curves for m in curve.m}):
        flops = count_flops(shapes, m, views, text_tokens)
        costs.append(Cost(m, sum(getattr(flops, part) for part in SCOPES[scope]) / 1e12))
    return costs


def _option(option: Option, unit: str) -> str:
    llm = "" if option.llm is None else f", {option.llm}"
    low, high = option.loss_interval
    guess = ", extrapolated" if option.extrapolated else ""
    return (
        f"m = {option.num_visual_tokens}{llm}: {option.cost:.3g} {unit}, predicted loss {option.loss:.1%} "
        f"[{low:.1%}, {high:.1%}]{guess}"
    )

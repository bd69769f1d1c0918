"""Choose the number of visual tokens (and the LLM) for a budget, from fitted curves and measured or counted costs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fusedvlm.console import progress
from fusedvlm.files import read_json
from fusedvlm.plain_data import build
from fusedvlm.scaling.laws.fit import percentile_interval
from fusedvlm.scaling.laws.law_forms import LAWS, fit_law, rank_laws
from fusedvlm.scaling.score_records import Curve, ScoreRecord, group_curves, read_scores

# The paper's benchmarks by what they ask of a visual token.
TASKS = {
    "ocr": ("OCRBench", "OCRVQA_TESTCORE", "TextVQA_VAL", "ChartQA_TEST"),
    "reasoning": (
        "AI2D_TEST",
        "HallusionBench",
        "MME",
        "MMStar",
        "POPE",
        "RealWorldQA",
        "SEEDBench2",
        "SEEDBench2_Plus",
        "SEEDBench_IMG",
        "ScienceQA_TEST",
    ),
    "caption": ("COCO_VAL",),
}
UNITS = {"flops": 1e-12, "kflops": 1e-9, "mflops": 1e-6, "gflops": 1e-3, "tflops": 1.0, "pflops": 1e3}
UNITS |= {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Budget:
    """An upper limit in the unit of a cost field: TFLOPs for "tflops", milliseconds for "latency_ms"."""

    amount: float
    field: str

    @property
    def text(self) -> str:
        """With its unit."""
        return f"{self.amount:g} {'TFLOPs' if self.field == 'tflops' else 'ms'}"


@dataclass(frozen=True)
class Cost:
    """Cost of answering with m visual tokens, by an LLM where there is a choice."""

    num_visual_tokens: int
    amount: float
    llm: str | None = None


@dataclass(frozen=True)
class CostRow:
    """A row of a file of costs."""

    num_visual_tokens: int
    tflops: float | None = None
    latency_ms: float | None = None
    llm: str | None = None


@dataclass(frozen=True)
class Option:
    """A choice with what it costs and what it is predicted to score.

    `relative_score` is the mean over benchmarks of the predicted score divided by that of the reference, the best
    choice at its largest m; `loss` is 1 - relative_score, with its bootstrap interval. `extrapolated` says that no
    score was measured at so small or so large an m.
    """

    num_visual_tokens: int
    llm: str | None
    cost: float
    relative_score: float
    loss: float
    loss_interval: tuple[float, float]
    predicted: dict[str, float]
    extrapolated: bool


@dataclass(frozen=True)
class Plan:
    """The best affordable option and its neighbors in cost; None where there is no cheaper or dearer one."""

    budget: Budget
    best: Option
    cheaper: Option | None
    dearer: Option | None
    reference: Option
    laws: dict[str, str]


def parse_budget(text: str) -> Budget:
    """ "2 TFLOPs", "500 GFLOPs", "150 ms" or "0.2 s" to a `Budget`.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-z]+)\s*", text.lower())
    unit = match and (match[2] if match[2] in UNITS else match[2] + "s")
    if not match or unit not in UNITS or not _is_positive(match[1]):
        raise ValueError(f"Budget {text!r} is not understood; write for instance '2 TFLOPs', '500 GFLOPs' or '150 ms'.")
    return Budget(float(match[1]) * UNITS[unit], "tflops" if unit.endswith("flops") else "latency_ms")


def read_costs(path: str | Path, field: str) -> list[Cost]:
    """JSON list of {"num_visual_tokens": m, "tflops": .., "latency_ms": .., "llm": optional name}.

    Args:
        field: "tflops" or "latency_ms", the one the budget is in.

    Raises:
        ValueError: naming the row that lacks a field, is not positive, or repeats another.
    """
    rows = read_json(path, None)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects with num_visual_tokens and {field}.")
    known = [entry.name for entry in fields(CostRow)]  # a profile says more
    costs: dict[tuple[str | None, int], Cost] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        stated = build(CostRow, {name: row[name] for name in known if name in row}, where)
        amount = getattr(stated, field)
        if amount is None:
            raise ValueError(f"{where}: no {field}; the budget is in {field}.")
        if min(stated.num_visual_tokens, amount) <= 0:
            raise ValueError(f"{where}: num_visual_tokens and {field} must be positive numbers.")
        key = (stated.llm, stated.num_visual_tokens)
        if key in costs:
            raise ValueError(f"{where}: a second cost of m={stated.num_visual_tokens}.")
        costs[key] = Cost(stated.num_visual_tokens, amount, stated.llm)
    return [*costs.values()]


def read_curves(
    source: str | Path, task: str, benchmarks: Sequence[str] = (), groups: Sequence[str] = ()
) -> list[Curve]:
    """Curves that stand for a task, from "paper", a score file, or the JSON that `scaling fit --json` printed.

    Args:
        task: a key of `TASKS`; ignored where `benchmarks` names some.
        benchmarks: names of benchmarks in the file.
        groups: "column=value" selections; a grouping column with several values must be selected, except `llm`.

    Raises:
        ValueError: when nothing in the file stands for the task, or several groups are left.
    """
    records = _fit_points(source) or read_scores(source)
    wanted = tuple(benchmarks) or TASKS.get(task)
    if wanted is None:
        raise ValueError(f"Unknown task {task!r}; tasks are {', '.join(TASKS)}.")
    chosen = [record for record in records if record.benchmark in wanted]
    if missing := sorted(set(benchmarks) - {record.benchmark for record in records}) or (not chosen and [task]):
        there = ", ".join(sorted({record.benchmark for record in records}))
        raise ValueError(
            f"No scores of {', '.join(missing)} in {source}; its benchmarks are {there}. Name some of them."
        )
    return _one_group(_select(chosen, groups), source)


def make_plan(
    curves: Sequence[Curve],
    costs: Sequence[Cost],
    budget: Budget,
    confidence: float = 0.9,
    resamples: int = 200,
    seed: int = 0,
) -> Plan:
    """The affordable option with the highest predicted score, by each benchmark's best law (AICc).

    The interval of the loss is a bootstrap over the points of every benchmark, the law refitted each time.

    Raises:
        ValueError: when nothing is affordable, or LLMs in the costs have no curves.
    """
    llms = _match_llms(curves, costs)
    ordered = sorted(costs, key=lambda cost: cost.amount)
    affordable = [cost for cost in ordered if cost.amount <= budget.amount]
    if not affordable:
        raise ValueError(
            f"A budget of {budget.text} buys nothing; the cheapest is m={ordered[0].num_visual_tokens} at "
            f"{ordered[0].amount:.3g} {budget.text.split()[-1]}."
        )
    predictions, draws, laws = _predict(curves, ordered, llms, resamples, seed)
    relative, relative_draws, reference = _relative(predictions, draws, ordered)
    options = [
        Option(
            cost.num_visual_tokens,
            cost.llm,
            cost.amount,
            float(relative[i]),
            float(1 - relative[i]),
            _interval(1 - relative_draws[:, i], confidence),
            {name: float(values[i]) for name, values in predictions.items()},
            any(not min(c.m) <= cost.num_visual_tokens <= max(c.m) for c in llms[cost.llm]),
        )
        for i, cost in enumerate(ordered)
    ]
    best = max(range(len(affordable)), key=lambda i: (options[i].relative_score, -options[i].cost))
    return Plan(
        budget,
        options[best],
        options[best - 1] if best > 0 else None,
        options[best + 1] if best + 1 < len(options) else None,
        options[reference],
        laws,
    )


def _interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = percentile_interval(draws, confidence)
    return float(low), float(high)


def _predict(
    curves: Sequence[Curve], costs: Sequence[Cost], llms: dict[str | None, list[Curve]], resamples: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
    """Per benchmark the predicted scores (options,), bootstrap draws (resamples, options), and laws used."""
    predictions: dict[str, np.ndarray] = {}
    draws: dict[str, np.ndarray] = {}
    laws: dict[str, str] = {}
    bar = progress(curves, description="bootstrap", leave=False)
    for index, curve in enumerate(bar):
        name = f"{curve.benchmark}/{curve.metric}"
        predictions.setdefault(name, np.full(len(costs), np.nan))
        draws.setdefault(name, np.full((resamples, len(costs)), np.nan))
        law = rank_laws(curve.m, curve.scores, curve.errors)[0].law
        laws[curve.name] = law
        mine = [i for i, cost in enumerate(costs) if curve in llms[cost.llm]]
        m = np.array([costs[i].num_visual_tokens for i in mine])
        predictions[name][mine] = fit_law(law, curve.m, curve.scores, curve.errors).predict(m)
        generator = np.random.default_rng([seed, index])
        draws[name][:, mine] = [fit_law(law, *_resample(curve, law, generator)).predict(m) for _ in range(resamples)]
    return predictions, draws, laws


def _relative(
    predictions: dict[str, np.ndarray], draws: dict[str, np.ndarray], costs: Sequence[Cost]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean over benchmarks relative to the reference: the LLM that is best at its largest m, at that m.

    The metrics of one benchmark share its weight, so that four metrics of the same answers do not count four times.
    """
    values, sampled = np.array([*predictions.values()]), np.array([*draws.values()])
    benchmarks = [name.partition("/")[0] for name in predictions]
    weight = np.array([1 / benchmarks.count(name) for name in benchmarks]) / len(set(benchmarks))
    largest = {cost.llm: max(c.num_visual_tokens for c in costs if c.llm == cost.llm) for cost in costs}
    ends = [i for i, cost in enumerate(costs) if cost.num_visual_tokens == largest[cost.llm]]
    means = weight @ (values[:, ends] / values[:, ends].max(1, keepdims=True))
    reference = ends[int(np.argmax(means))]
    relative = weight @ (values / values[:, [reference]])
    return relative, np.tensordot(weight, sampled / sampled[:, :, [reference]], 1), reference


def _resample(
    curve: Curve, law: str, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Points drawn with replacement until there are enough different m for the law."""
    m, scores = np.array(curve.m), np.array(curve.scores)
    errors = None if curve.errors is None else np.array(curve.errors)
    while True:
        picks = generator.integers(0, len(m), len(m))
        if len(np.unique(m[picks])) >= LAWS[law].num_parameters:
            return m[picks], scores[picks], None if errors is None else errors[picks]


def _match_llms(curves: Sequence[Curve], costs: Sequence[Cost]) -> dict[str | None, list[Curve]]:
    """Curves of every LLM in the costs; a single LLM on both sides needs no name."""
    named = {dict(curve.groups).get("llm") for curve in curves}
    llms = {cost.llm for cost in costs}
    if len(named) == len(llms) == 1:
        return {llms.pop(): list(curves)}
    if unknown := sorted(str(llm) for llm in llms - named):
        known = ", ".join(sorted(str(name) for name in named))
        raise ValueError(f"Costs name the LLM {', '.join(unknown)}; the scores have {known}. Give both a column llm.")
    matched = {llm: [curve for curve in curves if dict(curve.groups).get("llm") == llm] for llm in llms}
    names = {frozenset((c.benchmark, c.metric) for c in group) for group in matched.values()}
    if len(names) > 1:
        raise ValueError("The LLMs were not measured on the same benchmarks, so their scores do not compare.")
    return matched


def _fit_points(source: str | Path) -> list[ScoreRecord]:
    """Points inside a `scaling fit --json` document; empty when the source is something else."""
    path = Path(source)
    if path.suffix != ".json" or not path.exists():
        return []
    document = read_json(path, None)
    if not isinstance(document, dict) or "fits" not in document:
        return []
    return [
        ScoreRecord(
            fit["benchmark"],
            fit["metric"],
            m,
            score,
            tuple((name, fit[name]) for name in document["grouping"]),
            f"fit {number}",
            error,
        )
        for number, fit in enumerate(document["fits"], 1)
        for m, score, error in zip(
            fit["m"], fit["score"], fit.get("standard_error") or [None] * len(fit["m"]), strict=True
        )
    ]


def _select(records: list[ScoreRecord], groups: Sequence[str]) -> list[ScoreRecord]:
    for rule in groups:
        name, equals, value = rule.partition("=")
        values = sorted({dict(record.groups).get(name, "") for record in records} - {""})
        if not equals or value not in values:
            raise ValueError(f"Group {rule!r} selects nothing; write column=value, values of {name} are {values}.")
        records = [record for record in records if dict(record.groups).get(name) == value]
    return records


def _one_group(records: list[ScoreRecord], source: str | Path) -> list[Curve]:
    for name, _ in records[0].groups:
        values = sorted({dict(record.groups)[name] for record in records})
        if len(values) > 1 and name != "llm":
            raise ValueError(f"{source} has several {name}: {', '.join(values)}. Select one with {name}=VALUE.")
    return group_curves(records)


def _is_positive(value: str | float) -> bool:
    try:
        return 0 < float(value) < float("inf")
    except (TypeError, ValueError):
        return False

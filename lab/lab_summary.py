"""What a grid says: laws per kind of question, the best m for a budget, divergence beside them, the claim tested."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np

from fusedvlm.scaling import Curve, ScoreRecord, fit_curve
from fusedvlm.scaling.divergence.estimators import DivergenceResult
from fusedvlm.scaling.tradeoff.fit_tradeoff import GridCell, TradeoffFit, fit_tradeoff

from .variant_grid import FAMILY_TITLES, Cell, Grid

SCOPES = {"llm": "LLM", "all": "tower + fusion + LLM"}
BUDGETS = 6
WORTH = 2.0  # standard errors of a difference that counts
RESAMPLES = 200


@dataclass(frozen=True)
class Panel:
    """A kind of question in a family: its cells and the law Y = A / (N^alpha T^beta) + D over them.

    `why_not` says what keeps it from being fitted.
    """

    kind: str
    reads_question: bool
    cells: tuple[Cell, ...]
    fit: TradeoffFit | None = None
    why_not: str = ""

    @property
    def title(self) -> str:
        """For figures and tables."""
        return f"{self.kind}, {FAMILY_TITLES[self.reads_question]}"

    def at(self, llm_parameters: int, m: int) -> list[Cell]:
        """Cells of an LLM size at m; several where several trainings have it."""
        return [c for c in self.cells if (c.llm_parameters, c.num_visual_tokens) == (llm_parameters, m)]


@dataclass(frozen=True)
class Best:
    """LLM and m of the least error that a budget of FLOPs per question buys: by the law, and among measured cells."""

    kind: str
    reads_question: bool
    scope: str
    budget: float
    llm_parameters: int | None
    num_visual_tokens: int | None
    error: float | None
    measured_llm_parameters: int
    measured_num_visual_tokens: int
    measured_error: float


@dataclass(frozen=True)
class Growth:
    """One variant and kind: how its score and its divergence grow with the tokens.

    `alpha` is that of S = c / m^alpha, with what the standard errors say of that law. `slope` is d log E[D] / d log n
    over n = 1 ... N, `slopes` the local ones between the measured m; `theory_alpha` is alpha(N) for S proportional to
    E[D], from Upsilon. `implied_beta` = -alpha / slope is the beta of S ~ E[D]^beta that would join the two.
    """

    variant: str
    kind: str
    reads_question: bool
    llm_parameters: int
    alpha: float | None
    alpha_error: float | None
    verdict: str
    pairs: int = 0
    slope: float | None = None
    slopes: tuple[float, ...] = ()
    theory_alpha: float | None = None
    n_balance: float | None = None
    implied_beta: float | None = None


@dataclass(frozen=True)
class LabSummary:
    """Everything the page, the record and `--json` show."""

    panels: list[Panel]
    best: list[Best]
    growth: list[Growth]
    divergences: dict[str, tuple[int, bool, str, DivergenceResult]]
    verdicts: list[str]
    laws: list[str]
    notes: list[str] = field(default_factory=list)
    trainings: list[dict] = field(default_factory=list)
    text_scores: dict[int, dict[str, float]] = field(default_factory=dict)

    def document(self) -> dict:
        """JSON-ready."""
        return {
            "kind": "lab",
            "panels": [asdict(panel) | {"title": panel.title} for panel in self.panels],
            "best": [asdict(best) for best in self.best],
            "growth": [asdict(growth) for growth in self.growth],
            "verdicts": self.verdicts,
            "laws": self.laws,
            "notes": self.notes,
            "trainings": self.trainings,
            "text_scores": {str(size): scores for size, scores in self.text_scores.items()},
        }


def size_text(parameters: float) -> str:
    """A number of parameters as people say it.

    >>> size_text(29280), size_text(6.74e9)
    ('29.3 k', '6.74 B')
    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return f"{parameters:g}"


def summarize_grid(grid: Grid, text_tokens: int, question_tokens: int, notes: Sequence[str] = ()) -> LabSummary:
    """Fit, choose, compare and test the claim.

    Args:
        grid: from `variant_grid.read_grid_folder`.
        text_tokens: of the LLM's prompt besides the visual ones, for FLOPs.
        question_tokens: of them, those that fusion reads.
    """
    panels = [_panel(grid, reads, kind) for kind in grid.kinds for reads in grid.families]
    panels = [panel for panel in panels if panel.cells]
    costs = Costs(grid, text_tokens, question_tokens)
    best = [one for panel in panels for scope in SCOPES for one in best_for_budgets(panel, costs, scope)]
    growth = [_growth(grid, panel, name) for panel in panels for name in dict.fromkeys(c.variant for c in panel.cells)]
    divergences = {
        f"{variant.name}, {kind}": (variant.llm_parameters, variant.reads_question, kind, result)
        for variant in grid.variants
        for kind, result in variant.divergences.items()
    }
    return LabSummary(
        panels,
        best,
        growth,
        divergences,
        [*claim_verdicts(panels, best), *question_verdicts(panels), *divergence_verdicts(growth)],
        [law_line(panel) for panel in panels],
        [*notes, *grid.left_out],
        [{"variant": v.name, **_training_facts(v.training)} for v in grid.variants if v.training is not None],
        {v.llm_parameters: dict(v.text_scores) for v in grid.variants if v.text_scores},
    )


def _panel(grid: Grid, reads_question: bool, kind: str) -> Panel:
    cells = tuple(grid.cells(reads_question, kind))
    points = [
        GridCell(c.llm_parameters / 1e9, c.num_visual_tokens, c.score, c.variant, c.standard_error) for c in cells
    ]
    try:
        return Panel(kind, reads_question, cells, fit_tradeoff(points))
    except ValueError as error:
        return Panel(kind, reads_question, cells, None, str(error))


class Costs:
    """Counted FLOPs of a question, by LLM size and m; the connector is counted as its variants have it."""

    def __init__(self, grid: Grid, text_tokens: int, question_tokens: int) -> None:
        self.grid, self.text_tokens, self.question_tokens = grid, text_tokens, question_tokens
        self.known: dict[tuple, tuple[float, float]] = {}

    def __call__(self, reads_question: bool, llm_parameters: int, m: int, scope: str) -> float:
        """FLOPs to the first token: the LLM's alone, or all."""
        key = (reads_question, llm_parameters, m)
        if key not in self.known:
            variant = next(v for v in self.grid.of(reads_question) if v.llm_parameters == llm_parameters)
            flops = variant.flops(m, self.text_tokens, self.question_tokens)
            self.known[key] = (flops.prefill, flops.first_token)
        return self.known[key][0 if scope == "llm" else 1]


def best_for_budgets(panel: Panel, costs: Costs, scope: str) -> list[Best]:
    """The least error for budgets between the cheapest and the dearest cell, equally spaced in logs.

    Every integer m between the measured ones can be chosen by the law.
    """
    sizes = sorted({cell.llm_parameters for cell in panel.cells})
    counts = sorted({cell.num_visual_tokens for cell in panel.cells})
    options = [
        (costs(panel.reads_question, size, m, scope), size, m)
        for size in sizes
        for m in range(counts[0], counts[-1] + 1)
        if m - counts[0] < 256 or m in counts
    ]
    errors: dict[tuple[int, int], float] = {}
    for c in panel.cells:
        key = (c.llm_parameters, c.num_visual_tokens)
        errors[key] = 1 - float(np.mean([one.score for one in panel.at(*key)]))
    measured = [(costs(panel.reads_question, *key, scope), *key) for key in errors]
    found = []
    for budget in np.geomspace(min(measured)[0], max(measured)[0], BUDGETS):
        limit = budget * (1 + 1e-9)
        bought = [(size, m) for cost, size, m in measured if cost <= limit]
        chosen = min(bought, key=lambda key: (errors[key], key[0], key[1]))
        size = tokens = error = None
        if panel.fit is not None:
            affordable = np.array([(size, m) for cost, size, m in options if cost <= limit])
            predicted = panel.fit.error(affordable[:, 0] / 1e9, affordable[:, 1])
            place = int(np.argmin(predicted))
            size, tokens, error = int(affordable[place, 0]), int(affordable[place, 1]), float(predicted[place])
        found.append(
            Best(panel.kind, panel.reads_question, scope, float(budget), size, tokens, error, *chosen, errors[chosen])
        )
    return found


def _growth(grid: Grid, panel: Panel, name: str) -> Growth:
    variant = next(variant for variant in grid.of(panel.reads_question) if variant.name == name)
    cells = [cell for cell in panel.cells if cell.variant == name]
    points = tuple(
        ScoreRecord(panel.kind, "score", c.num_visual_tokens, c.score, standard_error=c.standard_error) for c in cells
    )
    alpha = error = None
    verdict = "one m only"
    if len(points) > 1:
        fit = fit_curve(Curve(panel.kind, "score", (), points), resamples=RESAMPLES)
        alpha, error, verdict = fit.power.alpha, fit.power.alpha_error, fit.verdict
    grown = Growth(name, panel.kind, panel.reads_question, variant.llm_parameters, alpha, error, verdict)
    result = variant.divergences.get(panel.kind)
    if result is None or len(result.mean_distance) < 2:
        return grown
    n = np.arange(1, len(result.mean_distance) + 1)
    distance = np.log(result.mean_distance)
    slope = float(np.polyfit(np.log(n), distance, 1)[0])
    marks = [m for m in variant.counts if m <= n[-1]]
    local = [float((distance[b - 1] - distance[a - 1]) / np.log(b / a)) for a, b in pairwise(marks)]
    return Growth(
        name, panel.kind, panel.reads_question, variant.llm_parameters, alpha, error, verdict,
        pairs=result.pairs, slope=slope, slopes=tuple(local),
        theory_alpha=result.alpha[-1] / result.beta if result.alpha else None, n_balance=result.n_balance,
        implied_beta=None if alpha is None or slope == 0 else -alpha / slope,
    )  # fmt: skip


def _training_facts(record: Mapping) -> dict:
    """Of `lab.json`: steps taken and planned, what they cost."""
    stages = record["stages"]
    looked = stages.get("look_up") or {}
    return {
        "look_up_steps": looked.get("steps"),
        "look_up_ended_by_its_loss": looked.get("ended_by_its_loss"),
        "steps": stages["steps"],
        "planned_steps": stages["planned_steps"],
        "tflops": stages["tflops"],
        "cpu_seconds": stages["cpu_seconds"],
        "seconds": record["seconds"],
        "load": record["load"],
    }


# The claim, in three parts that are tested one by one: a question that looks one thing up needs few tokens and gains
# from a larger language model; a dense one needs many tokens.


def claim_verdicts(panels: Sequence[Panel], best: Sequence[Best]) -> list[str]:
    """Sentences with the numbers behind them; for a grid without these two kinds, what holds for each of its own."""
    lines = claim_headlines(panels, best)
    for panel in panels:
        lines.append(_tokens_line(panel, [b for b in best if b.scope == "llm" and _same(b, panel)]))
        if (llm := _llm_line(panel)) is not None:
            lines.append(llm)
    return lines


def claim_headlines(panels: Sequence[Panel], best: Sequence[Best]) -> list[str]:
    """The claim in a line per family that has both kinds of question."""
    lines = []
    for reads in sorted({panel.reads_question for panel in panels}, reverse=True):
        mine = {panel.kind: panel for panel in panels if panel.reads_question == reads}
        if not {"look-up", "dense"} <= mine.keys():
            continue
        few, many = (_holds_tokens(mine[kind], best) for kind in ("look-up", "dense"))
        gain = _llm_gain(mine["look-up"])
        parts = {
            "few tokens for look-up questions": few,
            "a larger LLM for them": gain is not None and gain > WORTH,
            "many tokens for dense ones": many,
        }
        said = "; ".join(f"{part}: {'yes' if holds else 'no'}" for part, holds in parts.items())
        verdict = "reproduced" if all(parts.values()) else "not reproduced"
        lines.append(f"The claim, {FAMILY_TITLES[reads]}: {verdict} ({said}).")
    return lines


def _holds_tokens(panel: Panel, best: Sequence[Best]) -> bool:
    chosen = [b.measured_num_visual_tokens for b in best if b.scope == "llm" and _same(b, panel)]
    return _expected_tokens(panel.kind, chosen, max(cell.num_visual_tokens for cell in panel.cells))[1]


def _llm_gain(panel: Panel) -> float | None:
    """What the largest LLM gains over the smallest at the fewest tokens, in standard errors."""
    sizes = sorted({cell.llm_parameters for cell in panel.cells})
    least = min(cell.num_visual_tokens for cell in panel.cells)
    ends = [panel.at(size, least) for size in (sizes[0], sizes[-1])]
    return gain_between(*ends)[2] if len(sizes) > 1 and all(ends) else None


def gain_between(small: Sequence[Cell], large: Sequence[Cell]) -> tuple[float, float, float]:
    """Gain of the mean score, its standard error, and their ratio."""
    gain = float(np.mean([c.score for c in large]) - np.mean([c.score for c in small]))
    error = float(np.sqrt(sum(np.mean([c.standard_error for c in side]) ** 2 for side in (small, large))))
    return gain, error, gain / error


def _same(best: Best, panel: Panel) -> bool:
    return (best.kind, best.reads_question) == (panel.kind, panel.reads_question)


def law_line(panel: Panel) -> str:
    """The law of a kind and family in words."""
    fit = panel.fit
    if fit is None:
        return f"{panel.title}: no law fitted ({panel.why_not})"
    above = [100 * (1 - 2.0**-exponent) for exponent in (fit.alpha, fit.beta)]
    parts = ["[{:.2f}, {:.2f}]".format(*fit.intervals[name]) for name in ("alpha", "beta")]
    return (
        f"{panel.title}: error = A / (N^alpha T^beta) + D with alpha {fit.alpha:.2f} {parts[0]}, beta {fit.beta:.2f} "
        f"{parts[1]}, D {fit.d:.3f}; twice the LLM takes {above[0]:.0f} % off the error above D, twice the tokens "
        f"{above[1]:.0f} %. The standard errors say: {fit.verdict}. {_betas_line(panel)}"
    )


def betas_by_llm(panel: Panel) -> dict[int, float]:
    """{LLM parameters: beta of its cells alone, without a floor}; the product form has one beta for all of them."""
    found = {}
    for size in sorted({cell.llm_parameters for cell in panel.cells}):
        cells = [cell for cell in panel.cells if cell.llm_parameters == size]
        if len({cell.num_visual_tokens for cell in cells}) > 1:
            m, errors = np.log([c.num_visual_tokens for c in cells]), np.log([1 - c.score for c in cells])
            found[size] = -float(np.polyfit(m, errors, 1)[0])
    return found


def _betas_line(panel: Panel) -> str:
    parts = [f"{_plain(beta)} ({size_text(size)})" for size, beta in betas_by_llm(panel).items()]
    return f"Each LLM's cells alone have beta {', '.join(parts)}."


def _tokens_line(panel: Panel, best: Sequence[Best]) -> str:
    """How many tokens the budgets buy best, and whether that is few or many."""
    top = max(cell.num_visual_tokens for cell in panel.cells)
    chosen = [b.measured_num_visual_tokens for b in best]
    by_law = [str(b.num_visual_tokens) for b in best if b.num_visual_tokens is not None]
    expected, holds = _expected_tokens(panel.kind, chosen, top)
    said = f"{panel.title}: best measured m for budgets from {best[0].budget:.3g} to {best[-1].budget:.3g} LLM FLOPs: "
    said += ", ".join(map(str, chosen)) + (f"; by the law {', '.join(by_law)}" if by_law else "")
    return said + ("." if expected is None else f". {expected}: {'yes' if holds else 'no'}.")


def _expected_tokens(kind: str, chosen: Sequence[int], top: int) -> tuple[str | None, bool]:
    if kind == "look-up":
        return f"Few tokens (at most {max(1, top // 8)} of {top} at every budget)", max(chosen) <= max(1, top // 8)
    if kind == "dense":
        return f"Many tokens (at least {top // 2} of {top} at the largest budget)", chosen[-1] >= top // 2
    return None, False


def _llm_line(panel: Panel) -> str | None:
    """What the largest language model gains over the smallest at the least and at the most tokens."""
    sizes = sorted({cell.llm_parameters for cell in panel.cells})
    shared = [
        m
        for m in sorted({c.num_visual_tokens for c in panel.cells})
        if panel.at(sizes[0], m) and panel.at(sizes[-1], m)
    ]
    if len(sizes) < 2 or not shared:
        return None
    parts, gains = [], []
    for m in dict.fromkeys((shared[0], shared[-1])):
        gain, error, ratio = gain_between(panel.at(sizes[0], m), panel.at(sizes[-1], m))
        gains.append(ratio)
        parts.append(f"{gain:+.3f} ({error:.3f}) at m = {m}")
    verdict = f". A larger LLM helps at m = {shared[0]}: {'yes' if gains[0] > WORTH else 'no'}."
    ends = f"the LLM of {size_text(sizes[-1])} over that of {size_text(sizes[0])}: {', '.join(parts)}"
    return f"{panel.title}: {ends}{verdict if panel.kind == 'look-up' else '.'}"


def question_verdicts(panels: Sequence[Panel]) -> list[str]:
    """The fewest tokens with the question against the most without it, per kind and LLM."""
    lines = []
    by_kind: dict[str, dict[bool, Panel]] = {}
    for panel in panels:
        by_kind.setdefault(panel.kind, {})[panel.reads_question] = panel
    for kind, pair in by_kind.items():
        if len(pair) < 2:
            continue
        parts = []
        for size in sorted(
            {c.llm_parameters for c in pair[True].cells} & {c.llm_parameters for c in pair[False].cells}
        ):
            reads = [c for c in pair[True].cells if c.llm_parameters == size]
            blind = [c for c in pair[False].cells if c.llm_parameters == size]
            low, high = min(c.num_visual_tokens for c in reads), max(c.num_visual_tokens for c in blind)
            first = float(np.mean([c.score for c in reads if c.num_visual_tokens == low]))
            last = float(np.mean([c.score for c in blind if c.num_visual_tokens == high]))
            parts.append(f"{first:.3f} against {last:.3f} (LLM of {size_text(size)})")
        if parts:
            lines.append(f"{kind}: m = {low} with the question against m = {high} without it: {', '.join(parts)}.")
    return lines


def divergence_verdicts(growth: Sequence[Growth]) -> list[str]:
    """Whether one exponent beta joins divergence and scores, as the theory has it."""
    measured = [g for g in growth if g.implied_beta is not None and g.slope is not None]
    if len(measured) < 2:
        return []
    betas = [g.implied_beta for g in measured if g.implied_beta is not None]
    slopes, alphas = [g.slope or 0.0 for g in measured], [g.alpha or 0.0 for g in measured]
    joined = max(betas) <= 1.5 * max(min(betas), 1e-9)
    grown = f"E[D(n)] grows as n^{min(slopes):.2f} to n^{max(slopes):.2f}"
    scored = f"scores as m^{_plain(-max(alphas))} to m^{_plain(-min(alphas))}"
    needed = f"scores proportional to E[D]^beta would need beta from {_plain(min(betas))} to {_plain(max(betas))}"
    return [f"Divergence: {grown}, {scored}; {needed}: one exponent {'may join' if joined else 'does not join'} them."]


def _plain(value: float) -> str:
    """Two decimals, and no minus in front of a zero."""
    return f"{round(value, 2) + 0.0:.2f}"

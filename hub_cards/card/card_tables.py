"""The two tables of a card and its title, from facts, as plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusedvlm.costs.variant_info import Backbone
from fusedvlm.hub_cards.facts import CardFacts, mean_scores

if TYPE_CHECKING:
    from fusedvlm.evaluation.results import Latency, TaskScore

MISSING = "—"
BEFORE, AFTER = ("m", "repository", "mean", "mean, images swapped"), ("first token, ms", "answer, ms")


def render_title(facts: CardFacts) -> str:
    """The card's first heading: repository name and m."""
    if facts.is_dial:
        return f"{facts.repo_id.partition('/')[2]}, every m"
    return f"{facts.repo_id.partition('/')[2]}, m = {facts.m}"


def glance(facts: CardFacts) -> dict[str, str]:
    """The at-a-glance table: label -> text."""
    counted, m = facts.counted, facts.m
    mean = mean_scores(facts.measured).get(m)
    latency = _latency(facts, m)
    inside = "with the language model" if counted.self_contained else "without the language model"
    return {
        **counted.rows(),
        "Weights in this repository": f"{counted.weight_bytes:,} bytes, {inside}",
        "Language model": _backbone(counted.language_model),
        "Vision tower": _backbone(counted.vision),
        "License": facts.stated.license_name or facts.stated.license or f"{MISSING} (nobody stated one)",
        "Mean score": MISSING if mean is None else f"{mean:.3f}",
        "Time to first token": MISSING if latency is None else f"{_milliseconds(latency.time_to_first_token)} ms",
        "Time to a whole answer": MISSING if latency is None else f"{_milliseconds(latency.seconds_per_answer)} ms",
    }


def _backbone(backbone: Backbone) -> str:
    source = f" from {backbone.repo}" if backbone.repo else ", published nowhere else"
    at = f" at {backbone.revision}" if backbone.revision else ""
    return f"{backbone.type}{source}{at}, license: {backbone.license or MISSING}"


def _latency(facts: CardFacts, m: int) -> "Latency | None":
    rows = facts.measured.latencies if facts.measured else ()
    return next((row for row in rows if row.num_visual_tokens == m), None)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


@dataclass(frozen=True)
class FamilyTable:
    """Column names, and one row of texts per m; `current` is the row of this variant."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    current: int


def family_table(facts: CardFacts) -> FamilyTable:
    """All m of the family or of its results, with scores, control and latency; what was not measured is a dash."""
    scores = {row.key: row for row in facts.measured.scores} if facts.measured else {}
    tasks = sorted({task for task, _ in scores})
    means, control = mean_scores(facts.measured), mean_scores(facts.control)
    repos = {neighbor.num_visual_tokens: neighbor.repo_id for neighbor in facts.family}
    counts = sorted({*repos, *(m for _, m in scores), *(row.num_visual_tokens for row in _latencies(facts))})
    rows = []
    for m in counts:
        latency = _latency(facts, m)
        measured = [scores.get((task, m)) for task in tasks]
        rows.append(
            (
                str(m),
                repos.get(m, MISSING),
                f"{means[m]:.3f}" if m in means else MISSING,
                f"{control[m]:.3f}" if m in control else MISSING,
                *map(_score, measured),
                _milliseconds(latency.time_to_first_token) if latency else MISSING,
                _milliseconds(latency.seconds_per_answer) if latency else MISSING,
            )
        )
    return FamilyTable((*BEFORE, *tasks, *AFTER), tuple(rows), counts.index(facts.m))


def _score(row: "TaskScore | None") -> str:
    if row is None:
        return MISSING
    return f"{row.score:.3f}" + ("" if row.standard_error is None else f" ± {row.standard_error:.3f}")


def _latencies(facts: CardFacts) -> Sequence:
    return facts.measured.latencies if facts.measured else ()

"""The two plots of a card, from its facts alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from fusedvlm.charts import BLUE, COLORS, RED, png_bytes, task_styles, token_axis
from fusedvlm.hub_cards.facts import CardFacts, mean_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TASKS = len(COLORS)  # more lines than these cannot be told apart


def score_plot(facts: CardFacts) -> bytes | None:
    """PNG of score against m, this variant marked; None when nothing was measured at two m."""
    means = mean_scores(facts.measured)
    if len(means) < 2:
        return None
    return _png(lambda axes: _draw_scores(axes, facts, means), list(means))


def latency_plot(facts: CardFacts) -> bytes | None:
    """PNG of seconds per question against m; None when nothing was measured at two m."""
    rows = sorted(facts.measured.latencies, key=lambda row: row.num_visual_tokens) if facts.measured else []
    if len(rows) < 2:
        return None
    counts = [row.num_visual_tokens for row in rows]

    def draw(axes: "Axes") -> None:
        first = [1e3 * row.time_to_first_token for row in rows]
        answer = [1e3 * row.seconds_per_answer for row in rows]
        axes.plot(counts, first, "o-", color=BLUE, label="first token")
        axes.plot(counts, answer, "s--", color=RED, label="whole answer")
        _mark(axes, facts.m)
        axes.set_ylim(0, 1.15 * max(answer))
        axes.set_ylabel("milliseconds, pixels to text")

    return _png(draw, counts)


def _draw_scores(axes: "Axes", facts: CardFacts, means: dict[int, float]) -> None:
    measured = facts.measured.scores if facts.measured else []
    scores = [row for row in measured if row.is_primary and row.maximum is not None]
    tasks = sorted({row.label for row in scores})
    for task, (color, marker) in task_styles(tasks if len(tasks) <= MOST_TASKS else ()).items():
        rows = sorted((row for row in scores if row.label == task), key=lambda row: row.num_visual_tokens)
        axes.errorbar(
            [row.num_visual_tokens for row in rows],
            [row.score / (row.maximum or 1.0) for row in rows],
            yerr=[(row.standard_error or 0.0) / (row.maximum or 1.0) for row in rows],
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1,
            label=_label(task),
        )
    axes.plot(list(means), list(means.values()), "ko-", linewidth=2, label="mean")
    control = mean_scores(facts.control)
    if control:
        axes.plot(list(control), list(control.values()), "k:x", linewidth=1, label="mean, images swapped")
    _mark(axes, facts.m)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("score")


def _label(task: str) -> str:
    """A task's name for the legend: short, and without the dollars that matplotlib reads as mathematics."""
    name = " ".join(task.split())
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")


def _mark(axes: "Axes", m: int) -> None:
    """Mark this variant."""
    axes.axvline(m, color="#999999", linewidth=6, alpha=0.35, zorder=0, label=f"this variant, m = {m}")


def _png(draw: Callable, counts: list[int]) -> bytes:
    """A figure over m as PNG: opaque, so that it reads on dark pages, and the same bytes for the same facts."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="white")
        axes = figure.subplots()
        draw(axes)
        token_axis(axes, counts)
        figure.legend(fontsize=8, ncols=4, loc="outside upper center", frameon=False)
        return png_bytes(figure)

"""Figures of a lab as SVG in the page's colors: errors and their law, the best m of a budget, divergence.

Hues are Okabe and Ito's; markers and dashes tell the same, so that a gray print keeps it.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedvlm.charts import BLUE, GREEN, LINES, MARKERS, ORANGE, PURPLE, RED, SKY
from fusedvlm.comparison.comparison_figures import INK, ink, nice_ticks, to_svg
from fusedvlm.scaling.divergence.estimators import DivergenceResult

from .lab_summary import SCOPES, LabSummary, Panel, size_text
from .variant_grid import FAMILY_TITLES

HUES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
STYLES: Any = {"svg.fonttype": "none", "font.size": 10, "legend.frameon": False}
SIZE = (4.6, 3.9)


def error_figures(summary: LabSummary) -> list[tuple[str, str]]:
    """(title, SVG) per kind and family: error against m for every LLM, with the fitted law."""
    sizes = sorted({cell.llm_parameters for panel in summary.panels for cell in panel.cells})
    errors: dict[str, list[float]] = {}  # families of a kind stand on one scale
    for panel in summary.panels:
        errors.setdefault(panel.kind, []).extend(1 - cell.score for cell in panel.cells)
    limits = {kind: (0.6 * min(found), 1.25 * max(found)) for kind, found in errors.items()}
    return [(panel.title, _error_figure(panel, sizes, limits[panel.kind])) for panel in summary.panels]


def _error_figure(panel: Panel, sizes: Sequence[int], limits: tuple[float, float]) -> str:
    with matplotlib.rc_context({**STYLES, "svg.hashsalt": panel.title}):
        figure, axes = _blank()
        counts = sorted({cell.num_visual_tokens for cell in panel.cells})
        between = np.geomspace(counts[0], counts[-1], 60)
        for index, size in enumerate(sizes):
            cells = [cell for cell in panel.cells if cell.llm_parameters == size]
            look: dict[str, Any] = {"color": HUES[index % len(HUES)]}
            if not cells:
                continue
            if panel.fit is not None:
                axes.plot(between, panel.fit.error(size / 1e9, between), ls=LINES[index % len(LINES)], lw=1.2, **look)
            errors = np.array([1 - cell.score for cell in cells])
            bars = np.array([cell.standard_error for cell in cells])
            axes.errorbar(
                [cell.num_visual_tokens for cell in cells],
                errors,
                yerr=[np.minimum(bars, 0.95 * errors), bars],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                ls="none",
                elinewidth=0.9,
                label=f"LLM: {size_text(size)} parameters",
                **look,
            )
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        ticks = nice_ticks(*limits)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        _token_axis(axes, counts)
        axes.set_ylabel("error (1 - score)")
        return _finish(figure, axes)


def budget_figures(summary: LabSummary) -> list[tuple[str, str]]:
    """(title, SVG) per scope of cost: the m of least error against the budget; marks measured, lines by the law."""
    found = []
    for scope, what in SCOPES.items():
        with matplotlib.rc_context({**STYLES, "svg.hashsalt": scope}):
            figure, axes = _blank()
            counts = sorted({c.num_visual_tokens for panel in summary.panels for c in panel.cells})
            for index, panel in enumerate(summary.panels):
                rows = [
                    b
                    for b in summary.best
                    if (b.kind, b.reads_question, b.scope) == (panel.kind, panel.reads_question, scope)
                ]
                aside = 2 ** (0.09 * (index - (len(summary.panels) - 1) / 2))  # equal ones stand beside each other
                look: dict[str, Any] = {"color": HUES[index % len(HUES)]}
                budgets = [row.budget for row in rows]
                chosen = [row.measured_num_visual_tokens * aside for row in rows]
                marker, hollow = MARKERS[index % len(MARKERS)], "none" if not panel.reads_question else None
                if panel.fit is not None:
                    law = [(row.num_visual_tokens or 1) * aside for row in rows]
                    axes.plot(budgets, law, ls=LINES[index % len(LINES)], lw=1.1, alpha=0.8, **look)
                axes.plot(
                    budgets, chosen, marker=marker, mfc=hollow, ls="none", markersize=6, label=panel.title, **look
                )
            axes.set_xscale("log")
            budgets = [b.budget for b in summary.best if b.scope == scope]
            ticks = nice_ticks(min(budgets), max(budgets))
            axes.set_xticks(ticks, [f"{tick / _unit(ticks)[0]:g}" for tick in ticks])
            axes.set_xlabel(f"budget of one question, {_unit(ticks)[1]} ({what})")
            axes.set_yscale("log", base=2)
            axes.set_yticks(counts, [f"{m:g}" for m in counts])
            axes.set_ylabel("visual tokens m of least error")
            axes.minorticks_off()
            found.append((f"Best m for a budget: {what}", _finish(figure, axes)))
    return found


def divergence_figures(summary: LabSummary) -> list[tuple[str, str]]:
    """(title, SVG) per LLM: E[D(n)] against n, with the question and without."""
    sizes = sorted({size for size, *_ in summary.divergences.values()})
    found = []
    for size in sizes:
        mine = _lines([(reads, kind, result) for s, reads, kind, result in summary.divergences.values() if s == size])
        with matplotlib.rc_context({**STYLES, "svg.hashsalt": str(size)}):
            found.append((f"Divergence, LLM of {size_text(size)} parameters", _divergence_figure(mine)))
    return found


def _lines(results: Sequence[tuple[bool, str, DivergenceResult]]) -> list[tuple[str, DivergenceResult]]:
    """(label, result), with the question first; without it every kind of question has the same, which is drawn once."""
    lines: list[tuple[str, DivergenceResult]] = []
    for reads, kind, result in sorted(results, key=lambda one: not one[0]):
        same = [n for n, (_, other) in enumerate(lines) if not reads and other.mean_distance == result.mean_distance]
        if same:
            lines[same[0]] = (f"any, {FAMILY_TITLES[reads]}", result)
        else:
            lines.append((f"{kind}, {FAMILY_TITLES[reads]}", result))
    return lines


def _divergence_figure(lines: Sequence[tuple[str, DivergenceResult]]) -> str:
    figure, axes = _blank()
    longest, first = 1, 1.0
    for index, (label, result) in enumerate(lines):
        n = np.arange(1, len(result.mean_distance) + 1)
        longest, first = max(longest, len(n)), result.mean_distance[0] if index == 0 else first
        color, line = HUES[index % len(HUES)], LINES[index % len(LINES)]
        axes.plot(n, result.mean_distance, color=color, ls=line, lw=1.6, label=label)
    for power, name in ((0.5, r"$\sqrt{n}$"), (1.0, "$n$")):
        end = first * longest**power
        axes.plot([1, longest], [first, end], color=INK, ls=":", lw=0.8)
        beside: dict[str, Any] = {"va": "center", "xytext": (3, 0), "textcoords": "offset points"}
        axes.annotate(name, (longest, end), color=INK, fontsize=9, **beside)
    axes.set_yscale("log")
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = nice_ticks(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    _token_axis(axes, [2**k for k in range(int(np.log2(longest)) + 1)], "tokens n of the branches")
    axes.set_xlim(0.9, longest * 1.35)
    axes.set_ylabel("mean divergence E[D(n)]")
    return _finish(figure, axes)


def _unit(values: Sequence[float]) -> tuple[float, str]:
    for unit, name in ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")):
        if values[0] >= unit / 10:
            return unit, name
    return 1.0, "FLOPs"


def _blank() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots()


def _token_axis(axes: Axes, counts: Sequence[float], label: str = "visual tokens m") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{m:g}" for m in counts])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _finish(figure: Figure, axes: Axes) -> str:
    axes.grid(color=INK, alpha=0.15)
    ink(axes)
    legend = figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
    for text in legend.get_texts():
        text.set_color(INK)
    return to_svg(figure)

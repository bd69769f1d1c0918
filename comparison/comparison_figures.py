"""Panels of the comparison as SVG that takes the page's colors, light or dark.

Hues are Okabe and Ito's; the marker and the line's dashes tell the same as the hue, and the legend shows all three.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fusedvlm.charts import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW

from .summary import Interval, Point

INK = "#010203"  # replaced by the page's text color
HUES = {"fused": BLUE, "quecc": ORANGE, "dense": INK, "pool": GREEN, "resampler": RED, "anchored": PURPLE}
SPARE = (SKY, YELLOW, GREEN, RED, PURPLE, ORANGE)
CONNECTOR_MARKERS = {"fused": "o", "quecc": "D", "dense": "s", "pool": "^", "resampler": "v", "anchored": "P"}
REDUCER_STYLES = {
    "random": (SKY, "x"),
    "average": (YELLOW, "1"),
    "visionzip": (SKY, "*"),
    "vispruner": (YELLOW, "p"),
    "cdpruner": (SKY, "h"),
}
QUARTERS = [n / 4 for n in range(4, 40)]
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Style:
    """How one entrant looks in every panel."""

    color: str
    marker: str
    line: object
    filled: bool


@dataclass(frozen=True)
class Panel:
    """One figure: what stands on its axes. `x` gives None for points that lack it, which are left out."""

    title: str
    xlabel: str
    x: Callable[[Point], float | None]
    score: str = "score"
    is_count: bool = False
    spread: Callable[[Point], Interval | None] = lambda point: None


PANELS = (
    Panel("All questions", "visual tokens m", lambda p: p.num_visual_tokens, is_count=True),
    Panel("One-word questions", "visual tokens m", lambda p: p.num_visual_tokens, "one-word", is_count=True),
    Panel("Dense questions", "visual tokens m", lambda p: p.num_visual_tokens, "dense", is_count=True),
    Panel("Against the LLM's work", "LLM, MFLOPs to the first token", lambda p: mega(p.llm_flops)),
    Panel("Against all work", "tower + connector + LLM, MFLOPs to the first token", lambda p: mega(p.total_flops)),
    Panel(
        "Against time",
        "measured first token, ms (quartiles)",
        lambda p: None if p.latency_ms is None else p.latency_ms.mean,
        spread=lambda p: p.latency_ms,
    ),
    Panel("Against size", "trained parameters, thousands", lambda p: thousands(p.trained_parameters)),
)


def mega(value: float | None) -> float | None:
    """In millions."""
    return None if value is None else value / 1e6


def thousands(value: float | None) -> float | None:
    """In thousands."""
    return None if value is None else value / 1e3


def styles(entrants: Sequence[str]) -> dict[str, Style]:
    """A look for every entrant: hue and marker by connector or reducer, dashes by its settings."""
    found: dict[str, Style] = {}
    variants: dict[str, int] = {}
    spare = 0
    for entrant in entrants:
        base, _, reducer = entrant.partition("+")
        name = base.partition(":")[0]
        if reducer in REDUCER_STYLES:
            color, marker = REDUCER_STYLES[reducer]
            found[entrant] = Style(color, marker, ":", True)
            continue
        number = variants.get(name, 0)
        variants[name] = number + 1
        if name not in HUES and number == 0:
            HUES_FOR_OTHERS[name] = (SPARE[spare % len(SPARE)], "o^vDsP"[spare % 6])
            spare += 1
        color, marker = (HUES[name], CONNECTOR_MARKERS[name]) if name in HUES else HUES_FOR_OTHERS[name]
        found[entrant] = Style(color, marker, DASHES[number % len(DASHES)], number == 0)
    return found


HUES_FOR_OTHERS: dict[str, tuple[str, str]] = {}


def draw_panel(panel: Panel, points: Sequence[Point], looks: dict[str, Style]) -> str | None:
    """One panel as SVG; None when no point has what it shows."""
    shown = [point for point in points if panel.score in point.scores and panel.x(point) is not None]
    if not shown:
        return None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 10}):
        figure = Figure(figsize=(4.6, 3.5), layout="constrained")
        axes = figure.subplots()
        for entrant, style in looks.items():
            line = sorted((p for p in shown if p.entrant == entrant), key=lambda p: p.num_visual_tokens)
            if line:
                _draw_line(axes, panel, line, style)
        _dress(axes, panel, shown)
        return to_svg(figure)


def _draw_line(axes: Axes, panel: Panel, points: list[Point], style: Style) -> None:
    x: Any = [panel.x(point) for point in points]
    scores = [point.scores[panel.score] for point in points]
    y = [score.mean for score in scores]
    bars = [[score.mean - score.low for score in scores], [score.high - score.mean for score in scores]]
    spreads = [spread for point in points if (spread := panel.spread(point))]
    sides = None
    if len(spreads) == len(points):
        sides = [[max(0.0, s.mean - s.low) for s in spreads], [max(0.0, s.high - s.mean) for s in spreads]]
    axes.errorbar(
        x,
        y,
        yerr=bars,
        xerr=sides,
        color=style.color,
        marker=style.marker,
        markersize=5,
        mfc=style.color if style.filled else "none",
        ls=style.line,
        lw=1.4,
        elinewidth=0.9,
        alpha=0.95,
    )


def _dress(axes: Axes, panel: Panel, points: Sequence[Point]) -> None:
    axes.set_xscale("log", base=2 if panel.is_count else 10)
    values = sorted({x for point in points if (x := panel.x(point)) is not None})
    if panel.is_count:
        axes.set_xticks(values, [f"{value:g}" for value in values])
    else:
        axes.set_xlim(values[0] / 1.15, values[-1] * 1.15)
        ticks = nice_ticks(values[0], values[-1])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    top = max(point.scores[panel.score].high for point in points)
    axes.set_ylim(0, min(1.03, 1.05 * top) if top > 0 else 1.03)
    axes.set(xlabel=panel.xlabel, ylabel="score (0 to 1)")
    axes.grid(color=INK, alpha=0.15)
    ink(axes)


def ink(axes: Axes) -> None:
    """Labels, ticks and frame in the color of the page's text."""
    for part in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
        part.set_color(INK)
    axes.tick_params(color=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers over a logarithmic span."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(1, 10), [n / 2 for n in range(2, 20)], QUARTERS):
        ticks = [s * 10.0**e for e in range(-6, 13) for s in steps if low / 1.1 <= s * 10.0**e <= high * 1.1]
        if len(ticks) >= 3:
            return ticks if len(ticks) <= 6 else ticks[:: -(-len(ticks) // 5)]
    return [low, high] if high > low else [low]


def to_svg(figure: Figure) -> str:
    """A figure as SVG in the page's colors, as wide as its place; what is drawn in `INK` takes the text's color."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)


def legend_sample(style: Style) -> str:
    """The line and marker of one entrant, for the legend."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "legend"}):
        figure = Figure(figsize=(0.55, 0.2))
        axes = figure.add_axes((0, 0, 1, 1))
        face = style.color if style.filled else "none"
        axes.plot([0, 1, 2], [0, 0, 0], color=style.color, ls=style.line, lw=1.6)
        axes.plot([1], [0], color=style.color, marker=style.marker, mfc=face, ls="none", markersize=6)
        axes.set_axis_off()
        return to_svg(figure)

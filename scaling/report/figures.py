"""The figures of the scaling lab, each a pure function from typed records to a matplotlib figure.

Line styles, markers and hatches carry the same information as the colors, so that a gray print keeps it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedvlm.charts import (
    BLUE,
    COLORS,
    GREEN,
    LINES,
    MARKERS,
    ORANGE,
    RED,
    SKY,
    save_figure as save_figure,
    token_axis,
)
from fusedvlm.scaling.divergence.estimators import DivergenceResult
from fusedvlm.scaling.laws.compare_curves import CurveClusters, InputEffect, ModelScore
from fusedvlm.scaling.laws.fit import CurveFit, PowerLawFit, predict_interval
from fusedvlm.scaling.tradeoff.fit_tradeoff import GridCell, TradeoffFit

PSI = {
    "psi_eq": (r"$\psi_{eq}^{AB}$", BLUE, "-"),
    "psi_intra": (r"$\psi_{cross}^{intra}$", RED, "--"),
    "psi_ab": (r"$\psi_{cross}^{AB}$", GREEN, "-."),
}


def score_against_m(
    num_visual_tokens: Sequence[float],
    scores: Sequence[float],
    fit: PowerLawFit | None = None,
    standard_errors: Sequence[float] | None = None,
    excluded: Sequence[tuple[float, float]] = (),
    title: str = "",
    ylabel: str = "score",
) -> Figure:
    """Score against the number of visual tokens on a logarithmic axis, with the fitted law and its interval.

    Args:
        num_visual_tokens, scores: the points.
        fit: of `fit_power_law` on these points; its bootstrap interval is drawn as a band.
        standard_errors: of the scores, drawn as bars.
        excluded: (m, score) points left out of the fit, drawn hollow.
    """
    figure, axes = _one(6.0, 3.8)
    _draw_scores(axes, num_visual_tokens, scores, fit, standard_errors, excluded)
    axes.set(title=title, xlabel="visual tokens m", ylabel=ylabel)
    axes.legend(fontsize=8)
    return figure


def latency_against_m(
    num_visual_tokens: Sequence[int], series: Mapping[str, Sequence[float]], ylabel: str = "milliseconds"
) -> Figure:
    """One line per named series (for instance "first token", "whole answer") against m, from zero."""
    figure, axes = _one(6.0, 3.4)
    for index, (name, values) in enumerate(series.items()):
        axes.plot(num_visual_tokens, values, marker=MARKERS[index], ls=LINES[index], color=COLORS[index], label=name)
    token_axis(axes, num_visual_tokens)
    axes.set(xlabel="visual tokens m", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def fitted_curves(fits: Sequence[CurveFit], columns: int = 4) -> Figure:
    """Small multiples: scores, power law with interval, and the law that AICc prefers where it is another one."""
    rows = -(-len(fits) // columns)
    figure = Figure(figsize=(3.1 * min(columns, len(fits)), 2.5 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, min(columns, len(fits)), squeeze=False).ravel()
    for axes, fit in zip(grid, fits, strict=False):
        curve = fit.curve
        excluded = [(point.m, point.score) for point in curve.excluded]
        _draw_scores(axes, curve.m, curve.scores, fit.power, None, excluded, label=False)
        if fit.laws[0].law != "power":
            dense = np.geomspace(min(curve.m), max(curve.m), 80)
            axes.plot(dense, fit.laws[0].predict(dense), color=GREEN, ls="--", lw=1.2)
        group = ", ".join(value for _, value in curve.groups)
        facts = f"$\\alpha$={fit.power.alpha:.3f}, $R^2$={fit.power.r2:.2f}, best: {fit.laws[0].law.replace('_', '-')}"
        lines = [f"{curve.benchmark} {curve.metric}", *([group] if group else []), facts]
        axes.set_title("\n".join(lines), fontsize=7.5)
        axes.set_xlabel("")  # said once, below
        axes.tick_params(labelsize=7)
    for axes in grid[len(fits) :]:
        axes.set_visible(False)
    figure.supxlabel("visual tokens m", fontsize=9)
    figure.supylabel("score", fontsize=9)
    return figure


def psi_against_n(results: Mapping[str, DivergenceResult]) -> Figure:
    """psi_eq, psi_intra and psi_ab against n, one panel per named measurement."""
    figure, panels = _panels(len(results))
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        n = np.arange(1, len(result.count) + 1)
        for field, (label, colour, line) in PSI.items():
            axes.plot(n, _numbers(getattr(result, field)), color=colour, ls=line, label=label)
        axes.set(title=name, xlabel="tokens n", ylabel="mean cosine")
        axes.legend(fontsize=8)
    return figure


def intra_against_cross(results: Mapping[str, DivergenceResult]) -> Figure:
    """psi of one branch (AA, BB and their mean) above psi across branches: the condition psi_aa > psi_ab."""
    figure, panels = _panels(len(results))
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        n = np.arange(1, len(result.count) + 1)
        intra, across = _numbers(result.psi_intra), _numbers(result.psi_ab)
        axes.plot(n, _numbers(result.psi_aa), color=SKY, ls=":", label=r"$\psi_{cross}^{AA}$")
        axes.plot(n, _numbers(result.psi_bb), color=ORANGE, ls=":", label=r"$\psi_{cross}^{BB}$")
        axes.plot(n, intra, color=RED, ls="--", label=r"$\psi_{cross}^{intra}$")
        axes.plot(n, across, color=GREEN, ls="-.", label=r"$\psi_{cross}^{AB}$")
        axes.fill_between(n, across, intra, where=intra > across, color="0.85", label=r"$\Delta > 0$")
        axes.set(title=name, xlabel="tokens n", ylabel="mean cosine")
        axes.legend(fontsize=8)
    return figure


def bound_against_distance(results: Mapping[str, DivergenceResult]) -> Figure:
    """E[D(n)] with one and two standard deviations over pairs, and the fitted bound lambda sqrt(Upsilon(n))."""
    figure, panels = _panels(len(results))
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        n = np.arange(1, len(result.count) + 1)
        mean, deviation = np.array(result.mean_distance), np.array(result.std_distance)
        for width, shade in ((2, "0.90"), (1, "0.78")):
            label = rf"$\pm{width}\sigma$" if width > 1 else r"$\pm\sigma$"
            axes.fill_between(n, mean - width * deviation, mean + width * deviation, color=shade, label=label)
        axes.plot(n, mean, color=BLUE, lw=2, label=r"$E[D(n)]$")
        if result.lambda_ is not None:
            bound = result.lambda_ * np.sqrt(result.upsilon[: result.tokens_with_bound])
            axes.plot(
                n[: len(bound)],
                bound,
                color=RED,
                ls="--",
                label=rf"$\lambda\sqrt{{\Upsilon}}$, $\lambda$={result.lambda_:.3g}",
            )
        axes.set(title=name, xlabel="tokens n", ylabel="divergence")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, loc="upper left")
    return figure


def alpha_against_n(results: Mapping[str, DivergenceResult]) -> Figure:
    """alpha(n) between its limits -beta/2 and -beta."""
    figure, axes = _one(6.0, 3.4)
    for index, (name, result) in enumerate(results.items()):
        n = np.arange(1, len(result.alpha) + 1)
        axes.plot(n, np.array(result.alpha) / result.beta, color=COLORS[index], ls=LINES[index], label=name)
    for limit, name in ((-0.5, r"$-\beta/2$: growth as $\sqrt{n}$"), (-1, r"$-\beta$: growth as $n$")):
        axes.axhline(limit, color="0.6", lw=0.8)
        axes.annotate(name, (0.99, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="tokens n", ylabel=r"$\alpha(n)/\beta$", xscale="log")
    axes.legend(fontsize=8)
    return figure


def cosine_histograms(results: Mapping[str, DivergenceResult]) -> Figure:
    """Distributions of the cosines behind the psi, as outlines of different style."""
    figure, panels = _panels(len(results))
    labels = {**PSI, "psi_aa": (r"$\cos$ AA", SKY, ":"), "psi_bb": (r"$\cos$ BB", ORANGE, "-")}
    names = {"psi_eq": "same position, A against B", "psi_ab": "other position, A against B"}
    names |= {"psi_aa": "other position, within A", "psi_bb": "other position, within B"}
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        for field, counts in result.histograms.items():
            total = sum(counts)
            if total:
                _, colour, line = labels[field]
                shares = np.array(counts) / total
                axes.stairs(shares, result.bin_edges, color=colour, ls=line, lw=1.4, label=names[field])
        seen = np.flatnonzero(np.sum([*result.histograms.values()], axis=0))
        low, high = result.bin_edges[seen[0]] - 0.05, result.bin_edges[seen[-1] + 1] + 0.05
        axes.set(title=name, xlabel="cosine", ylabel="share", xlim=(max(low, -1), min(high, 1)))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def input_effect_bars(effects: Sequence[InputEffect], first: str, second: str) -> Figure:
    """Bars of the mean relative difference between two kinds of input, a dot for every m."""
    figure, axes = _one(6.4, 0.8 + 0.26 * len(effects))
    for row, effect in enumerate(reversed(effects)):
        better = effect.mean > 0
        colour, hatch = (GREEN, None) if better else (ORANGE, "///")
        axes.barh(row, effect.mean, color=colour, hatch=hatch, edgecolor="white", height=0.7)
        axes.plot(effect.per_cent, np.full(len(effect.per_cent), row), "|", color="0.25", markersize=6)
    axes.set_yticks(range(len(effects)), [f"{e.benchmark} {e.metric}" for e in reversed(effects)], fontsize=7)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xscale("symlog", linthresh=10)
    ticks = [t for t in (-100, -10, -5, 0, 5, 10, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"difference in per cent: {first} against {second}\n(bar: mean over m; tick: each m)", fontsize=8)
    axes.set_ylim(-0.6, len(effects) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    return figure


def cluster_panels(clusters: CurveClusters) -> Figure:
    """Min-max normalized curves by K-means cluster, the cluster's mean in bold."""
    count = int(clusters.labels.max()) + 1
    figure = Figure(figsize=(3.1 * count, 3.2 + 0.15 * np.bincount(clusters.labels).max()), layout="constrained")
    for label, axes in enumerate(figure.subplots(1, count, squeeze=False, sharey=True).ravel()):
        members = np.flatnonzero(clusters.labels == label)
        for index, member in enumerate(members):
            axes.plot(
                clusters.m,
                clusters.normalized[member],
                color=COLORS[index % 7],
                ls=LINES[index // 7 % 7],
                lw=0.8,
                label=clusters.names[member].split(" (")[0],
            )
        axes.plot(clusters.m, clusters.normalized[members].mean(0), color="black", lw=2.2)
        token_axis(axes, clusters.m, gap=3.5)
        axes.set(title=f"cluster {label + 1}: {len(members)} curves", xlabel="visual tokens m")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    figure.axes[0].set_ylabel("normalized score")
    return figure


def radar(scores: Sequence[ModelScore]) -> Figure:
    """Models against each other, each benchmark scaled to its best model; a benchmark that a model lacks is a gap."""
    benchmarks = sorted({score.benchmark for score in scores})
    best = {name: max(s.score for s in scores if s.benchmark == name) for name in benchmarks}
    angles = np.linspace(0, 2 * np.pi, len(benchmarks), endpoint=False)
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for index, model in enumerate(dict.fromkeys(score.model for score in scores)):
        by_name = {s.benchmark: s.score / best[s.benchmark] for s in scores if s.model == model}
        values = np.array([by_name.get(name, np.nan) for name in benchmarks])
        axes.plot(
            np.append(angles, angles[0]),
            np.append(values, values[0]),
            color=COLORS[index % 7],
            ls=LINES[index % 7],
            marker=MARKERS[index % 7],
            markersize=4,
            label=model,
        )
    axes.set_xticks(angles, benchmarks, fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1 = best"], fontsize=7)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return figure


def tradeoff_plot(cells: Sequence[GridCell], fit: TradeoffFit) -> Figure:
    """Left: error against visual tokens per LLM. Right: the same against FLOPs, the cheapest choice in bold."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    sizes, counts = sorted({c.llm_params_b for c in cells}), sorted({c.num_visual_tokens for c in cells})
    dense = np.geomspace(counts[0], counts[-1], 100)
    for index, size in enumerate(sizes):
        style = {"color": COLORS[index % 7], "ls": LINES[index % 7]}
        points = sorted((c.num_visual_tokens, 1 - c.score) for c in cells if c.llm_params_b == size)
        tokens, errors = np.array(points).T
        for axes, scale in ((left, 1.0), (right, 2e9 * size)):
            offset = fit.text_tokens if axes is right else 0
            axes.plot(scale * (dense + offset), fit.error(size, dense), lw=1.2, **style)
            label = f"{size:g}B" if axes is left else None
            marker = {"marker": MARKERS[index % 7], "color": style["color"], "ls": "none", "markersize": 5}
            axes.plot(scale * (tokens + offset), errors, label=label, **marker)
    costs = [(2e9 * n * (fit.text_tokens + v), float(fit.error(n, v))) for n in sizes for v in dense]
    right.plot(*_frontier(costs), color="black", lw=3, alpha=0.35, label="best choice (fit)")
    token_axis(left, counts)
    left.set(xlabel="visual tokens V", ylabel="error (1 - accuracy)")
    right.set(xlabel=f"FLOPs = 2 N (Q + V), Q = {fit.text_tokens}", xscale="log")
    right.grid(alpha=0.3)
    title = rf"$\alpha$={fit.alpha:.3f} (parameters), $\beta$={fit.beta:.3f} (tokens), D={fit.d:.2g}"
    left.set_title(title, fontsize=9)
    left.legend(fontsize=8, title="LLM")
    right.legend(fontsize=8)
    return figure


def _draw_scores(
    axes: Axes,
    m: Sequence[float],
    scores: Sequence[float],
    fit: PowerLawFit | None,
    standard_errors: Sequence[float] | None,
    excluded: Sequence[tuple[float, float]],
    label: bool = True,
) -> None:
    every = [*m, *(x for x, _ in excluded)]
    if fit is not None:
        dense = np.geomspace(min(every), max(every), 80)
        if fit.alpha_interval is not None:
            low, high = predict_interval(m, scores, dense, fit.confidence)
            axes.fill_between(dense, low, high, color=SKY, alpha=0.35, lw=0, label=f"{fit.confidence:.0%} interval")
        law = rf"${fit.c:.3g}\,/\,m^{{{fit.alpha:.3f}}}$, $R^2$ = {fit.r2:.2f}"
        axes.plot(dense, fit.predict(dense), color=BLUE, lw=1.6, label=law if label else None)
    axes.errorbar(m, scores, yerr=standard_errors, fmt="o", color="black", markersize=4, lw=1, label="measured")
    if excluded:
        hollow: dict[str, Any] = {"marker": "o", "mfc": "white", "mec": "black", "ls": "none", "markersize": 5}
        axes.plot(*zip(*excluded, strict=True), label="left out of the fit", **hollow)
    token_axis(axes, every)
    axes.set_ylim(*_room([*scores, *(score for _, score in excluded)], standard_errors))


def _room(scores: Sequence[float], errors: Sequence[float] | None) -> tuple[float, float]:
    """Ends of the axis of scores: the measured points with room around them, and nothing below 0 where no score is.

    A law's band may end far above any score that can be; the points, not the band, say how much is shown.
    """
    bars = np.zeros(len(scores))
    if errors is not None:
        bars[: len(errors)] = errors
    low, high = float(np.min(scores - bars)), float(np.max(scores + bars))
    room = 0.12 * max(high - low, 0.05 * abs(high), 1e-9)
    return (max(low - room, -room / 3) if min(scores) >= 0 else low - room), high + room


def _frontier(costs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points that no cheaper point beats, by cost."""
    frontier: list[tuple[float, float]] = []
    for cost, error in sorted(costs):
        if not frontier or error < frontier[-1][1]:
            frontier.append((cost, error))
    return [cost for cost, _ in frontier], [error for _, error in frontier]


def _one(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    """Up to three panels in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.2 * columns, 5.4), 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """None (no cross measure at n = 1) as a gap in a line."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)

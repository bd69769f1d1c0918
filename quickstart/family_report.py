"""The report of a quickstart run: one self-contained HTML page with plots and examples, and its numbers as JSON."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fusedvlm.charts import BLUE, LINES, ORANGE, RED, TASK_STYLES, data_uri, figure_uri, token_axis
from fusedvlm.files import write_atomically, write_json
from fusedvlm.scaling.report.scaling_report import collect, write_report as write_scaling_report
from fusedvlm.templates import load_template

from .compare import Comparison
from .family import Family
from .world import TASKS

GROUP_NAMES = {False: "one-word tasks", True: "list and read"}
TEMPLATE = Path(__file__).parent / "report.html.jinja"


def write_report(families: list[Family], folder: Path) -> Path:
    """Write report.html and report.json of one or several runs; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    html = load_template(TEMPLATE, is_html=True, lstrip_blocks=True).render(
        families=[_family_view(family) for family in families],
        tasks=TASKS,
        environment=families[0].results.environment,
    )
    write_atomically(page, html)
    write_json(folder / "report.json", summary(families, page))
    return page


def write_scaling_pages(families: list[Family]) -> list[Path]:
    """The scaling lab's page of each family, beside its results: rival laws, held-out errors, latency."""
    pages = []
    for family in families:
        # Swapped images are a control, not a benchmark: only results.json is read.
        material = collect(family.folder)
        for found in (material.curves, material.left_out):
            for name in [name for name in found if name.startswith("swapped.json")]:
                del found[name]
        page = family.folder / "scaling.html"
        write_scaling_report(material, page)
        pages.append(page)
    return pages


def second_turns(family: Family) -> list[dict[str, Any]]:
    """Rows of the table of second turns: what came before, m, m', score of each task, the largest loss on first ones.

    A first question's score is that of the same task at the same number of tokens.
    """
    first = {(s.task, s.num_visual_tokens): s.score for s in family.results.scores}
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for turn in family.second_turns:
        key = (turn.after, turn.num_visual_tokens, turn.num_followup_visual_tokens)
        row = rows.setdefault(
            key, {"after": turn.after.replace("_", "-"), "m": key[1], "followup": key[2], "scores": {}, "worst": None}
        )
        row["scores"][turn.task] = turn
        at_first = first.get((turn.task, turn.num_followup_visual_tokens))
        if at_first is not None:
            row["worst"] = max(row["worst"] or 0.0, at_first - turn.score)
    return list(rows.values())


def second_turn_table(family: Family) -> list[str]:
    """The second turns as lines of text."""
    lines = [
        "Second turns, one-word questions (m of the first question > m' of the second; how far below a first one):"
    ]
    for row in second_turns(family):
        scores = "  ".join(f"{task} {turn.score:.3f}" for task, turn in row["scores"].items())
        worst = "" if row["worst"] is None else f"  {row['worst']:.3f} below at most"
        lines.append(f"  after a {row['after']:<8} question, {row['m']:>2} > {row['followup']}: {scores}{worst}")
    return lines


def between_neighbors(family: Family) -> list[dict[str, Any]]:
    """Every task at the m between the variants' own: its score, and what its neighbors' scores say in between.

    The interpolation is linear in log2 m. `z` is the difference in standard errors of it (those of the three scores,
    taken as independent); `is_between` says whether the score lies between its neighbors' to two standard errors.
    """
    if family.between is None:
        return []
    measured = {(s.task, s.num_visual_tokens): s for s in family.results.scores}
    counts = sorted({m for _, m in measured})
    rows = []
    for score in family.between.scores:
        m = score.num_visual_tokens
        lower, upper = max(c for c in counts if c < m), min(c for c in counts if c > m)
        low, high = measured[score.task, lower], measured[score.task, upper]
        weight = float(np.log2(m / lower) / np.log2(upper / lower))
        expected = (1 - weight) * low.score + weight * high.score
        errors = [row.standard_error or 0.0 for row in (score, low, high)]
        parts = (errors[0], (1 - weight) * errors[1], weight * errors[2])
        error = float(np.sqrt(np.sum(np.square(parts))))
        slack = 2 * error
        rows.append(
            {
                "task": score.task, "m": m, "score": score.score, "neighbors": (lower, upper), "expected": expected,
                "standard_error": error, "z": (score.score - expected) / error if error else 0.0,
                "is_between": min(low.score, high.score) - slack <= score.score <= max(low.score, high.score) + slack,
            }
        )  # fmt: skip
    return rows


def comparison_figure(comparison: Comparison, dense: bool) -> Figure:
    """Mean score over one-word tasks, or over dense ones, against m, for every recipe."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for entrant, color, marker, line in zip(comparison.entrants, (BLUE, ORANGE, RED), "osD", LINES, strict=False):
        means, errors = entrant.means(dense), entrant.errors(dense)
        axes.errorbar(
            list(means),
            list(means.values()),
            yerr=list(errors.values()),
            color=color,
            marker=marker,
            linestyle=line,
            markersize=5,
            label=entrant.title,
        )
    token_axis(axes, means)
    axes.set_title(GROUP_NAMES[dense], fontsize=11)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("mean score")
    figure.legend(loc="outside lower center", ncols=1, fontsize=9)
    return figure


def summary(families: list[Family], page: Path) -> dict[str, Any]:
    """Everything measured, as one JSON document."""
    return {
        "report": str(page),
        "environment": asdict(families[0].results.environment),
        "families": [
            {
                "folder": str(family.folder),
                "mean_score": family.mean_scores(),
                "mean_score_swapped": family.mean_scores(swapped=True),
                "fit": None if family.fit is None else asdict(family.fit),
                "verdict": None if family.fit is None else family.verdict,
                "scores": [asdict(score) for score in family.results.scores],
                "latencies": [asdict(latency) for latency in family.results.latencies],
                "stages": family.stages,
                "between": between_neighbors(family),
                "second_turns": [asdict(turn) for turn in family.second_turns],
                "comparison": None if family.comparison is None else family.comparison.record(),
            }
            for family in families
        ],
        "alpha": _spread([family.fit.alpha for family in families if family.fit is not None]),
    }


def score_figure(family: Family) -> Figure:
    """Score against m on logarithmic axes: each task, the mean with its fitted law, the mean on swapped images."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for task in TASKS:
        points = [s for s in family.results.scores if s.task == task]
        color, marker = TASK_STYLES[task]
        axes.errorbar(
            [p.num_visual_tokens for p in points],
            [p.score for p in points],
            yerr=[p.standard_error or 0.0 for p in points],
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1,
            alpha=0.8,
            label=task,
        )
    means, swapped = family.mean_scores(), family.mean_scores(swapped=True)
    axes.plot(list(means), list(means.values()), "ko", markersize=7, label="mean")
    if family.fit is not None:
        grid = np.geomspace(min(means), max(means), 50)
        label = f"{family.fit.c:.2f} / m^{family.fit.alpha:.2f}, R² = {family.fit.r2:.2f}"
        axes.plot(grid, family.fit.predict(grid), "k-", linewidth=1.5, label=label)
    axes.plot(list(swapped), list(swapped.values()), "k:x", linewidth=1, label="mean, images swapped")
    token_axis(axes, means)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("score")
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    return figure


def latency_figure(family: Family) -> Figure:
    """Seconds to the first token and to a whole answer against m."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    counts = [row.num_visual_tokens for row in family.results.latencies]
    axes.plot(
        counts,
        [1e3 * row.time_to_first_token for row in family.results.latencies],
        "o-",
        color=BLUE,
        label="first token",
    )
    axes.plot(
        counts,
        [1e3 * row.seconds_per_answer for row in family.results.latencies],
        "s--",
        color=RED,
        label="8 tokens",
    )
    token_axis(axes, counts)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("milliseconds, pixels to text")
    axes.legend(fontsize=8)
    return figure


def _family_view(family: Family) -> dict[str, Any]:
    """What the page shows of one run."""
    means, swapped = family.mean_scores(), family.mean_scores(swapped=True)
    by_task = {(s.task, s.num_visual_tokens): s for s in family.results.scores}
    shown: dict[int, dict] = {}
    for example in family.examples:
        sample = example["sample"]
        entry = shown.setdefault(id(sample), {"image": _image_uri(sample.image), "questions": []})
        entry["questions"].append(example)
    return {
        "folder": family.folder.name,
        "reads_question": "look_up" in family.stages.get("generation", {}),
        "counts": list(means),
        "means": means,
        "swapped": swapped,
        "scores": {task: [by_task[task, m] for m in means] for task in TASKS},
        "fit": family.fit,
        "verdict": None if family.fit is None else family.verdict,
        "stages": family.stages,
        "latencies": family.results.latencies,
        "score_plot": figure_uri(score_figure(family)),
        "latency_plot": figure_uri(latency_figure(family)),
        "between": between_neighbors(family),
        "second_turns": second_turns(family),
        "comparison": None if family.comparison is None else family.comparison.entrants,
        "comparison_plots": []
        if family.comparison is None
        else [figure_uri(comparison_figure(family.comparison, dense)) for dense in GROUP_NAMES],
        "group_names": GROUP_NAMES,
        "examples": list(shown.values()),
    }


def _image_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.resize((192, 192), 0).save(buffer, format="PNG")
    return data_uri(buffer.getvalue())


def _spread(values: list[float]) -> dict | None:
    """Mean and range over seeds; None without a fit."""
    if not values:
        return None
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values), "seeds": len(values)}

"""The comparison as one self-contained HTML page, as a text table, and as JSON beside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fusedvlm.files import write_atomically
from fusedvlm.templates import load_template

from .cells import DENSE, ONE_WORD, Cell
from .comparison_figures import PANELS, draw_panel, legend_sample, mega, styles, thousands
from .plan import Plan
from .summary import Interval, Point, Summary

MISSING = "-"
HEADER = (
    "entrant", "m", "score", "one-word", "dense", "difference", "LLM MFLOPs", "all MFLOPs", "first token, ms",
    "trained, k", "training TFLOPs", "steps",
)  # fmt: skip


def world_notes(plan: Plan, cells: Sequence[Cell], command: str) -> list[str]:
    """What was equal, and what the numbers do not say."""
    seeds, environments = sorted({cell.seed for cell in cells}), [cell.environment for cell in cells]
    loads = [environment["load"] for environment in environments]
    first = environments[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    one_seed = " One seed: intervals cover questions only, not what another training would give."
    return [
        f"Equal for all: {plan.num_images} training images, the frozen tower ({plan.vision_layers} layers of "
        f"{plan.vision_width}) and LLM ({plan.llm_layers} layers of {plan.llm_width}), the order of conversations, and "
        f"{plan.training_tflops:g} counted training TFLOPs for each set of weights (forward and backward, as torch "
        "counts them). A cheap connector gets more steps for them, not another schedule.",
        "One set of weights serves every m where the connector allows it; the others spend the budget once for each m. "
        "Reducers use the dense connector's weights and train nothing.",
        f"Seeds: {', '.join(map(str, seeds))}.{one_seed if len(seeds) == 1 else ''}",
        "The tower is a stand-in for CLIP, taught by the renderer's labels to read each cell in its own patch; the LLM "
        "has read only texts of this world. An order that holds here need not hold at real size.",
        "FLOPs are torch's count of one question up to the first token of its answer, attention as its full square.",
        f"Measured on {first['hardware']}, {first['date']}, {versions}, load {min(loads):g} to {max(loads):g} "
        "(1-minute average). Times are the working thread's own on a CPU with one thread, else the "
        "clock's.",
        f"Command: {command}",
    ]


def given_notes() -> list[str]:
    """What a comparison of given results does not say."""
    return [
        "Scores are those of the files, means over their tasks; intervals are 1.96 standard errors over questions.",
        "Nothing was trained here: data, training compute and towers are whatever each variant had.",
        "FLOPs are counted from each variant's configuration, for an image that fills its views, where there is one.",
    ]


def write_page(
    summary: Summary, folder: Path, title: str, lead: str, refused: Sequence[str] = (), name: str = "comparison"
) -> Path:
    """Write `NAME.html` and `NAME.json` into a folder; returns the page."""
    points = summary.points
    looks = styles(list(dict.fromkeys(point.entrant for point in points)))
    counted = [((p.entrant, ""), (str(p.num_visual_tokens), "")) for p in points]
    drawn = [(panel.title, draw_panel(panel, points, looks)) for panel in PANELS]
    tasks = [task for task in points[0].scores if task not in ("score", "one-word", "dense")]
    seeds = max(point.seeds for point in points)
    page = load_template(Path(__file__).with_name("comparison.html.jinja"), is_html=True).render(
        title=title,
        lead=lead,
        verdicts=summary.verdicts,
        legend=[(entrant, legend_sample(style)) for entrant, style in looks.items()],
        panels=[{"title": panel_title, "svg": svg} for panel_title, svg in drawn if svg is not None],
        over="questions" if seeds == 1 else f"questions and {seeds} seeds",
        reference=summary.reference,
        header=HEADER,
        rows=[row(point) for point in points],
        task_header=("entrant", "m", *tasks),
        tasks=[[*who, *(both(p.scores.get(t)) for t in tasks)] for who, p in zip(counted, points, strict=True)],
        refused=list(refused),
        notes=summary.notes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps({**asdict(summary), "refused": list(refused)}, indent=2))
    path = folder / f"{name}.html"
    write_atomically(path, page)
    return path


def both(value: Interval | None, sign: str = "") -> tuple[str, str]:
    """A mean and its interval as text; a dash for what is missing."""
    if value is None:
        return MISSING, ""
    return f"{value.mean:{sign}.3f}", f"[{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def row(point: Point) -> list[tuple[str, str]]:
    """One line of the table: (text, small text) per column of `HEADER`."""
    latency = (MISSING, "")
    if point.latency_ms is not None:
        time = point.latency_ms
        latency = (f"{time.mean:.2f}", f"[{time.low:.2f}, {time.high:.2f}]" if time.high > time.low else "")
    return [
        (point.entrant, ""),
        (str(point.num_visual_tokens), ""),
        both(point.scores.get("score")),
        both(point.scores.get("one-word")),
        both(point.scores.get("dense")),
        both(point.difference, "+"),
        number(mega(point.llm_flops), ".2f"),
        number(mega(point.total_flops), ".2f"),
        latency,
        number(thousands(point.trained_parameters), ".1f"),
        number(point.training_tflops, ".3g"),
        number(point.training_steps, "d"),
    ]


def number(value: float | int | None, form: str) -> tuple[str, str]:
    """A number as text, or a dash."""
    return (MISSING, "") if value is None else (f"{value:{form}}", "")


def text_table(summary: Summary) -> str:
    """The same for a terminal: one line per point, then the verdicts."""
    lines = [[*HEADER]]
    for point in summary.points:
        lines.append([f"{text} {small}".strip() for text, small in row(point)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    body = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*body, "", *summary.verdicts])


def markdown_record(summary: Summary, title: str) -> str:
    """The same as a record for `benchmarks/results`."""
    lines = [f"# {title}", "", *(f"- {line}" for line in summary.verdicts), ""]
    lines += markdown_table(HEADER, [[f"{text} {small}".strip() for text, small in row(p)] for p in summary.points])
    tasks = [task for task in (*ONE_WORD, *DENSE) if task in summary.points[0].scores]
    if tasks:
        rows = [
            [p.entrant, str(p.num_visual_tokens), *(both(p.scores.get(t))[0] for t in tasks)] for p in summary.points
        ]
        lines += ["", "Task by task:", "", *markdown_table(("entrant", "m", *tasks), rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in summary.notes)]) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]

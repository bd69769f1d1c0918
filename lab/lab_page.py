"""A lab as one self-contained HTML page, as JSON and CSV beside it, as text and as a Markdown record."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fusedvlm.comparison.comparison_page import MISSING, markdown_table
from fusedvlm.files import write_atomically, write_json
from fusedvlm.templates import load_template

from .lab_figures import budget_figures, divergence_figures, error_figures
from .lab_summary import SCOPES, LabSummary, size_text
from .variant_grid import FAMILY_TITLES

STYLE = Path(__file__).parents[1] / "comparison" / "page_style.css.jinja"
LAW_HEADER = ("questions", "A", "alpha (LLM)", "beta (tokens)", "D", "standard errors say", "cells")
BEST_HEADER = ("questions", "cost of", "budget, MFLOPs", "measured: LLM", "m", "error", "by the law: LLM", "m", "error")
GROWTH_HEADER = (
    "questions", "LLM", "alpha of scores", "its error", "standard errors say", "slope of log E[D]", "its local slopes",
    "alpha by Upsilon", "n_balance", "beta needed",
)  # fmt: skip
TRAINING_HEADER = ("weights", "look-up steps", "steps", "of planned", "TFLOPs", "CPU seconds", "seconds", "load")
GRID_COLUMNS = ("task", "llm_params_b", "num_visual_tokens", "score", "standard_error", "family")


def write_page(summary: LabSummary, folder: Path, title: str, lead: str) -> Path:
    """Write `lab.html`, `lab.json` and `lab-grid.csv` into a folder; returns the page."""
    tables = Tables(summary)
    page = load_template(Path(__file__).with_name("lab.html.jinja"), is_html=True).render(
        title=title,
        lead=lead,
        style=load_template(STYLE).render(),
        verdicts=summary.verdicts,
        errors=error_figures(summary),
        law_header=LAW_HEADER,
        laws=tables.laws(),
        law_lines=summary.laws,
        budgets=budget_figures(summary),
        best_header=BEST_HEADER,
        best=tables.best(),
        divergences=divergence_figures(summary),
        growth_header=GROWTH_HEADER,
        growth=tables.growth(),
        cell_header=tables.cell_header(),
        cells=tables.cells(),
        training_header=TRAINING_HEADER,
        trainings=tables.trainings(),
        text_header=tables.text_header(),
        texts=tables.texts(),
        notes=summary.notes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "lab.json", summary.document())
    write_atomically(folder / "lab-grid.csv", grid_csv(summary))
    path = folder / "lab.html"
    write_atomically(path, page)
    return path


def grid_csv(summary: LabSummary) -> str:
    """The cells as `fusedvlm scaling optimal FILE --task "KIND, FAMILY"` reads them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(GRID_COLUMNS)
    for panel in summary.panels:
        for c in panel.cells:
            size, family = c.llm_parameters / 1e9, FAMILY_TITLES[panel.reads_question]
            row = (
                f"{panel.kind} {family}",
                f"{size:.6g}",
                c.num_visual_tokens,
                f"{c.score:.6f}",
                f"{c.standard_error:.6f}",
            )
            writer.writerow((*row, family))
    return text.getvalue()


class Tables:
    """Rows of the page's tables; a dash is not measured or not said."""

    def __init__(self, summary: LabSummary) -> None:
        self.summary = summary

    def laws(self) -> list[list[tuple[str, str]]]:
        """One row per kind and family."""
        rows = []
        for panel in self.summary.panels:
            fit = panel.fit
            if fit is None:
                empty = [(MISSING, "")] * 4
                rows.append([(panel.title, ""), *empty, (panel.why_not, ""), (str(len(panel.cells)), "")])
                continue
            values = [
                (f"{getattr(fit, name):.3g}", "[{:.3g}, {:.3g}]".format(*fit.intervals[name]))
                for name in ("a", "alpha", "beta", "d")
            ]
            rows.append([(panel.title, ""), *values, (fit.verdict, ""), (str(fit.n), "")])
        return rows

    def best(self) -> list[list[str]]:
        """One row per kind, family, scope and budget."""
        rows = []
        for b in self.summary.best:
            law = [MISSING] * 3
            if b.llm_parameters is not None and b.error is not None:
                law = [size_text(b.llm_parameters), str(b.num_visual_tokens), f"{b.error:.4f}"]
            measured = [
                size_text(b.measured_llm_parameters),
                str(b.measured_num_visual_tokens),
                f"{b.measured_error:.4f}",
            ]
            title = f"{b.kind}, {FAMILY_TITLES[b.reads_question]}"
            rows.append([title, SCOPES[b.scope], f"{b.budget / 1e6:.3g}", *measured, *law])
        return rows

    def growth(self) -> list[list[str]]:
        """One row per variant and kind."""
        return [
            [
                f"{g.kind}, {FAMILY_TITLES[g.reads_question]}",
                size_text(g.llm_parameters),
                number(g.alpha, ".3f"),
                number(g.alpha_error, ".3f"),
                g.verdict,
                number(g.slope, ".2f"),
                " ".join(f"{slope:.2f}" for slope in g.slopes) or MISSING,
                number(g.theory_alpha, ".2f"),
                number(g.n_balance, ".1f"),
                number(g.implied_beta, ".2f"),
            ]
            for g in self.summary.growth
        ]

    def counts(self) -> list[int]:
        """Every measured m."""
        return sorted({cell.num_visual_tokens for panel in self.summary.panels for cell in panel.cells})

    def cell_header(self) -> list[str]:
        """Of `cells`."""
        return ["questions", "variant", "LLM", *(f"m = {m}" for m in self.counts())]

    def cells(self) -> list[list[tuple[str, str]]]:
        """One row per kind, family and variant."""
        rows = []
        for panel in self.summary.panels:
            for name in dict.fromkeys(cell.variant for cell in panel.cells):
                mine = {cell.num_visual_tokens: cell for cell in panel.cells if cell.variant == name}
                scores = [
                    (f"{mine[m].score:.3f}", f"({mine[m].standard_error:.3f})") if m in mine else (MISSING, "")
                    for m in self.counts()
                ]
                size = size_text(next(iter(mine.values())).llm_parameters)
                rows.append([(panel.title, ""), (name, ""), (size, ""), *scores])
        return rows

    def trainings(self) -> list[list[str]]:
        """One row per set of weights that a lab trained."""
        return [
            [
                str(one["variant"]),
                number(one["look_up_steps"], "d"),
                str(one["steps"]),
                str(one["planned_steps"]),
                f"{one['tflops']:.3g}",
                f"{one['cpu_seconds']:.0f}",
                f"{one['seconds']:.0f}",
                f"{one['load']:g}",
            ]
            for one in self.summary.trainings
        ]

    def text_header(self) -> list[str]:
        """Of `texts`."""
        scores = self.summary.text_scores
        return ["LLM", *(next(iter(scores.values())) if scores else ())]

    def texts(self) -> list[list[str]]:
        """One row per language model of a lab."""
        return [
            [size_text(size), *(f"{score:.3f}" for score in scores.values())]
            for size, scores in sorted(self.summary.text_scores.items())
        ]


def number(value: float | int | None, form: str) -> str:
    """A number as text, or a dash."""
    return MISSING if value is None else f"{value:{form}}"


def text_summary(summary: LabSummary) -> str:
    """For a terminal: every cell, then what came out."""
    tables = Tables(summary)
    lines: list[Sequence[str]] = [tables.cell_header()]
    lines += [[f"{text} {small}".strip() for text, small in row] for row in tables.cells()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*body, "", *summary.laws, "", *summary.verdicts])


def markdown_record(summary: LabSummary, title: str) -> str:
    """The same as a record for `benchmarks/results`."""
    tables = Tables(summary)
    lines = [f"# {title}", "", *(f"- {line}" for line in (*summary.verdicts, *summary.laws))]
    for heading, header, rows in (
        ("Cells", tables.cell_header(), [[f"{t} {s}".strip() for t, s in row] for row in tables.cells()]),
        ("Laws", LAW_HEADER, [[f"{t} {s}".strip() for t, s in row] for row in tables.laws()]),
        ("Best m for a budget", BEST_HEADER, tables.best()),
        ("Scores against divergence", GROWTH_HEADER, tables.growth()),
        ("Trainings", TRAINING_HEADER, tables.trainings()),
        ("The language models alone, reading descriptions", tables.text_header(), tables.texts()),
    ):
        if rows:
            lines += ["", f"## {heading}", "", *markdown_table(header, rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in summary.notes)]) + "\n"

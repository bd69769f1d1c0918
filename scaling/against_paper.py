"""Scores of one's own beside those of the paper, cell by cell, and where they differ by more than chance."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .score_records import PAPER, read_scores

WITH_QUESTION, WITHOUT_QUESTION = "vision+question+queries", "vision+queries"
SURE = 1.96  # standard errors of a difference


@dataclass(frozen=True)
class Cell:
    """One score beside the paper's.

    Args:
        benchmark, metric, num_visual_tokens: of both.
        score, standard_error: our own.
        paper: the paper's score; it states no errors.
        is_different: whether they differ by more than 1.96 standard errors, the paper's taken to be as large as ours;
            None without an error of ours.
    """

    benchmark: str
    metric: str
    num_visual_tokens: int
    score: float
    standard_error: float | None
    paper: float
    is_different: bool | None

    @property
    def difference(self) -> float:
        """Ours minus the paper's."""
        return self.score - self.paper


def paper_cells(fusion_inputs: str = WITH_QUESTION) -> dict[tuple[str, str, int], float]:
    """{(benchmark, metric, m): score} of the paper, for one kind of fusion input.

    Raises:
        ValueError: for a kind that it does not have.
    """
    records = read_scores(PAPER)
    kinds = sorted({dict(record.groups)["fusion_inputs"] for record in records})
    if fusion_inputs not in kinds:
        raise ValueError(f"{fusion_inputs!r} is no kind of the paper; there are {', '.join(kinds)}.")
    return {
        (record.benchmark, record.metric, record.m): record.score
        for record in records
        if dict(record.groups)["fusion_inputs"] == fusion_inputs
    }


def against_paper(rows: Iterable[Any], fusion_inputs: str = WITH_QUESTION) -> list[Cell]:
    """Rows of a results file that the paper has, too.

    Args:
        rows: `fusedvlm.evaluation.TaskScore`.
        fusion_inputs: what the fusion module read; the paper has three kinds.
    """
    known, cells = paper_cells(fusion_inputs), []
    for row in rows:
        named = (row.task, row.metric, row.num_visual_tokens)
        if named in known:
            is_different = _is_different(row.score - known[named], row.standard_error)
            cells.append(Cell(*named, row.score, row.standard_error, known[named], is_different))
    return cells


def _is_different(difference: float, error: float | None) -> bool | None:
    return None if error is None else abs(difference) > SURE * 2**0.5 * error


def cell_lines(cells: Iterable[Cell], fusion_inputs: str) -> list[str]:
    """The comparison as text, one line for each cell, and what it comes to."""
    cells = list(cells)
    verdicts = {True: "differs", False: "as the paper", None: "no error to judge by"}
    lines = [f"Against the paper ({fusion_inputs}):"]
    for cell in cells:
        error = "" if cell.standard_error is None else f" ± {cell.standard_error:.2f}"
        lines.append(
            f"  {cell.benchmark} {cell.metric} m={cell.num_visual_tokens}: {cell.score:.2f}{error}, "
            f"paper {cell.paper:.2f} ({cell.difference:+.2f}): {verdicts[cell.is_different]}"
        )
    different = sum(cell.is_different is True for cell in cells)
    return [*lines, f"{different} of {len(cells)} cells differ by more than the error."]


def cell_document(cells: Iterable[Cell], fusion_inputs: str) -> dict[str, Any]:
    """The same as plain data."""
    rows = [{**asdict(cell), "difference": cell.difference} for cell in cells]
    return {"fusion_inputs": fusion_inputs, "cells": rows}

"""From what was asked for to the summary and its page; what `fusedvlm scaling lab` runs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .lab_jobs import LabFolder
from .lab_notes import given_notes, lab_lead, lab_notes
from .lab_page import markdown_record as markdown_record, text_summary as text_summary, write_page
from .lab_plan import claim_folder, make_plan, read_plan
from .lab_run import run_workers
from .lab_summary import LabSummary, summarize_grid
from .variant_grid import parse_kinds as parse_kinds, read_grid_folder

WORLD_TOKENS, USUAL_TOKENS = (4, 3), (35, 10)  # text tokens of a prompt, and those of them that fusion reads


@dataclass(frozen=True)
class Request:
    """The command line, typed."""

    folder: Path | None
    output: Path
    minutes: float
    workers: int
    threads: int
    preset: str
    llm_widths: str | None
    tokens: str | None
    seed: int
    kinds: Mapping[str, tuple[str, ...]]
    text_tokens: int | None
    question_tokens: int | None
    report: bool
    command: str

    def lengths(self, usual: tuple[int, int]) -> tuple[int, int]:
        """Text tokens and question tokens, `usual` where none were named.

        Raises:
            ValueError: when fusion would read more of the question than the prompt holds.
        """
        text = usual[0] if self.text_tokens is None else self.text_tokens
        question = min(usual[1], text) if self.question_tokens is None else self.question_tokens
        if question > text:
            raise ValueError(f"--question-tokens {question} are part of --text-tokens {text}; name at most so many.")
        return text, question


def run_lab(request: Request) -> tuple[LabSummary, Path, str]:
    """Train what is missing, or read what is there; returns the summary, its page and its title.

    Raises:
        ValueError: for a folder with another plan or without results.
        RuntimeError: when a process of the lab failed.
    """
    summary, title, lead = _given(request) if request.folder is not None else _trained(request)
    return summary, write_page(summary, request.output, title, lead), title


def _given(request: Request) -> tuple[LabSummary, str, str]:
    """A user's own grid."""
    assert request.folder is not None
    grid = read_grid_folder(request.folder, request.kinds)
    lengths = request.lengths(USUAL_TOKENS)
    summary = summarize_grid(grid, *lengths, given_notes(grid, *lengths, request.command))
    lead = f"{len(grid.variants)} variants of {request.folder}; nothing was trained."
    return summary, "Visual tokens against LLM size", lead


def _trained(request: Request) -> tuple[LabSummary, str, str]:
    """A lab: what is missing of it is trained, unless only its page is asked for."""
    if request.report:
        lab = LabFolder(read_plan(request.output), request.output, request.command)
    else:
        deadline = time.time() + 60 * request.minutes
        plan = make_plan(request.preset, request.llm_widths, request.tokens, request.seed)
        claim_folder(request.output, plan)
        lab = LabFolder(plan, request.output, request.command, deadline, request.workers)
        run_workers(lab, request.workers, request.threads)
    grid = read_grid_folder(lab.folder / "variants", request.kinds)
    lengths = request.lengths(WORLD_TOKENS)
    summary = summarize_grid(grid, *lengths, lab_notes(lab, grid, *lengths, request.command))
    meaningless = "" if request.preset == "cpu" or request.report else " At this preset the scores mean nothing."
    return summary, "Visual tokens against LLM size, from scratch", lab_lead(lab.plan) + meaningless

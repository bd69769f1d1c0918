"""`fusedvlm scaling lab`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fusedvlm.console import emit_json, say, show
from fusedvlm.files import write_atomically


def lab(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Read variants of several LLMs and their results; train nothing.", metavar="[DIR]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Run folder; the same command continues in it.")] = Path("runs/lab"),
    minutes: Annotated[float, typer.Option(min=1, help="Clock: trainings end early, and say so, to keep it.")] = 15.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the trainings.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    llm_widths: Annotated[str | None, typer.Option(help="Widths of the LLMs, e.g. 16,32,64; the preset's.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of visual tokens, e.g. 1,4,16; the preset's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of world, language models and trainings.")] = 0,
    preset: Annotated[str, typer.Option(help="cpu, or glance (half a minute; its scores mean nothing).")] = "cpu",
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="NAME=task,task: tasks that are one kind of question. Repeatable."),
    ] = None,
    text_tokens: Annotated[int | None, typer.Option(min=0, help="Text tokens of a prompt: 4, or 35 with DIR.")] = None,
    question_tokens: Annotated[
        int | None, typer.Option(min=0, help="Those that fusion reads: 3, or 10 with DIR.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Only the page, of what is finished.")] = False,
    record: Annotated[Path | None, typer.Option(help="Also write a Markdown record here.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure the trade-off of LLM size and visual tokens from scratch, with the question and without it.

    Trains language models of several sizes on texts of the quickstart's world, and over each two sets of weights: one
    whose fusion reads the question, one whose fusion does not. Each is scored at every m; for each kind of question
    Y(N, T) = A / (N^alpha T^beta) + D is fitted and the best m for a FLOP budget chosen; divergence is measured beside
    it. One page shows it all and says which part of the claim holds: few tokens and a larger LLM to look one thing up,
    many tokens for a dense question. A killed run continues where it stopped.

    With DIR the same page is made of your own grid: a folder of variants of several LLMs, each with results.json.

    \b
    Examples:
      fusedvlm scaling lab
      fusedvlm scaling lab --minutes 40 --output runs/lab --record lab.md
      fusedvlm scaling lab --output runs/lab --report
      fusedvlm scaling lab my-variants --kind "ocr=textvqa,ocrbench" --kind "reasoning=pope" --output runs/mine
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with variants of several language models, or none.")
    from .whole_lab import Request, markdown_record, parse_kinds, run_lab, text_summary

    request = Request(
        folder, output, minutes, workers, threads, preset, llm_widths, tokens, seed, parse_kinds(kind or ()),
        text_tokens, question_tokens, report, shlex.join(["fusedvlm", *sys.argv[1:]]),
    )  # fmt: skip
    summary, page, title = run_lab(request)
    if record is not None:
        write_atomically(record, markdown_record(summary, title))
        say(f"Record: {record}")
    if json_output:
        emit_json({**summary.document(), "page": str(page)})
    else:
        show(text_summary(summary))
        show(f"Page: {page}")

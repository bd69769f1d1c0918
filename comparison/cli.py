"""`fusedvlm compare`."""

from pathlib import Path
from typing import Annotated

import typer

from fusedvlm.console import emit_json, say, show
from fusedvlm.files import write_atomically


def compare(
    entrants: Annotated[
        list[str] | None,
        typer.Argument(help="Connectors, dense+REDUCER, or folders and files with results.", metavar="[NAME...]"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every connector and every reducer that can run.")] = False,
    list_them: Annotated[bool, typer.Option("--list", help="Name what can be compared, and stop.")] = False,
    output: Annotated[Path, typer.Option(help="Run folder; the same command continues in it.")] = Path("runs/compare"),
    tokens: Annotated[str | None, typer.Option(help="Numbers of visual tokens, e.g. 1,4,16; the preset's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of everything, to see their spread.")] = 1,
    preset: Annotated[str, typer.Option(help="cpu, gpu, or glance (seconds; its scores mean nothing).")] = "cpu",
    tflops: Annotated[float | None, typer.Option(min=0, help="Training TFLOPs of each set of weights.")] = None,
    reference: Annotated[str | None, typer.Option(help="Differences are from this one; fused.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Only the page, of what is finished in the folder.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; one job is too small for more.")] = 1,
    record: Annotated[Path | None, typer.Option(help="Also write a Markdown record here.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare ways to m visual tokens: same images, frozen tower and LLM, counted training FLOPs and data order.

    Names train what is missing on a small rendered world and score every m by free decoding: the page has score against
    m, LLM FLOPs, all FLOPs, time and trained parameters, with intervals. A killed run continues where it stopped; two
    processes may share a folder. Folders and results.json files are compared as they are, nothing is trained.

    \b
    Examples:
      fusedvlm compare --list
      fusedvlm compare fused quecc --tokens 1,4,16
      fusedvlm compare fused "fused:fuse_question=false" dense+visionzip --seeds 3
      fusedvlm compare --all --output runs/compare
      fusedvlm compare --all --output runs/compare --report
      fusedvlm compare runs/mine/variant runs/other/results.json
    """
    from .comparison_page import markdown_record, text_table
    from .whole_comparison import Request, catalog, compare_given, compare_names, report_finished, split_paths

    if list_them:
        document, text = catalog(preset, tokens)
        if json_output:
            emit_json(document)
        else:
            show(text)
        return
    names, paths = split_paths(entrants or [])
    if paths:
        if names or everything:
            raise ValueError(
                "Results that are there and names that are trained cannot stand on one page; run it twice."
            )
        summary, page, title = compare_given(paths, output)
    else:
        request = Request(names, everything, output, tokens, seeds, preset, tflops, reference, threads)
        summary, page, title = report_finished(request) if report else compare_names(request)
    if record is not None:
        write_atomically(record, markdown_record(summary, title))
        say(f"Record: {record}")
    if json_output:
        emit_json({**summary.document(), "page": str(page)})
    else:
        show(text_table(summary))
        show(f"Page: {page}")

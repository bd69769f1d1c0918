"""`fusedvlm info` and `fusedvlm profile`."""

from pathlib import Path
from typing import Annotated

import typer

from fusedvlm.console import emit_json, progress, say, show
from fusedvlm.files import write_json
from fusedvlm.model_source import require_source

PAPER_COUNTS = "1,8,16,32,64,128,256,384,512,768"  # for the help text; the work is in profiled_model


def info(
    model: Annotated[str, typer.Argument(help="Variant folder or Hub repository.", metavar="DIR|REPO")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the repository.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what a variant is: sizes, number of visual tokens, backbones, parameters by group.

    Reads the configuration only, so it costs no memory even for a large model.

    Example: fusedvlm info runs/quickstart/fusedvlm-m32
    """
    require_source("model", model, "config.json")
    from .variant_info import describe_variant, render_info

    if json_output:
        emit_json(describe_variant(model, revision))
    else:
        show(render_info(model, revision))


def profile(
    model: Annotated[
        str | None, typer.Option("--model", help="Variant folder or Hub repository to count and time.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="'paper': the paper's size. Counted without weights; timed with --time only.")
    ] = None,
    counts: Annotated[
        str | None,
        typer.Option(
            "--num-visual-tokens", "-m", help=f"m, one or several with commas; {PAPER_COUNTS} for the paper's size."
        ),
    ] = None,
    image_size: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT of the image; decides the number of views.")
    ] = "640x480",
    text_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens beside the visual ones.")] = 35,
    question_tokens: Annotated[int, typer.Option(min=0, help="Question tokens of the fusion module.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds per m, after one warm-up; medians are shown.")] = 5,
    timed: Annotated[
        bool | None, typer.Option("--time/--no-time", help="Time it here; by default a --model is, --shapes is not.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="dtype of random weights made for --shapes --time.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the costs for `fusedvlm plan --costs`.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what an image and a question cost at each number of visual tokens.

    FLOPs by structure, checked stage by stage against torch's own counter; bytes of the key-value cache; and, timed on
    this machine: encode, fuse, prefill, their sum to the first token, decode speed, peak memory.

    \b
    Examples:
      fusedvlm profile --shapes paper
      fusedvlm profile --model runs/quickstart/fusedvlm-m32 --image-size 64x64 --json
    """
    if (model is None) == (shapes is None):
        raise ValueError("Give exactly one of --model DIR and --shapes paper.")
    if shapes not in (None, "paper"):
        raise ValueError(f"--shapes {shapes!r} is unknown; there is 'paper'.")
    require_source("--model", model, "config.json")
    from . import profiled_model as work

    config = work.paper_config() if model is None else work.load_config(model)
    numbers = work.parse_counts(counts, config)
    workload = work.Workload(work.count_image_views(image_size, config), text_tokens, question_tokens)
    timed = model is not None if timed is None else timed
    loaded = work.load_model(model, config, dtype, device) if timed else None
    with progress(total=len(numbers), description="profiling") as bar:
        rows = work.profile(
            config, work.read_shapes(config), numbers, workload, loaded, repeats, lambda m: bar.update()
        )
    records = [row.record() for row in rows]
    sweep = work.time_every_count(loaded, numbers, workload, repeats) if loaded is not None and len(rows) > 1 else None
    if output is not None:
        write_json(output, records)
        say(f"Costs: {output}")
    if json_output:
        environment = work.describe_environment("fusedvlm profile")
        document = {"model": model or "paper's shapes, random weights", "workload": vars(workload), "rows": records}
        document |= {} if sweep is None else {"all_counts_seconds": sweep}
        emit_json({**document, "hardware": environment.hardware if timed else None, "versions": environment.versions})
    else:
        show(f"{workload.num_views} views, {text_tokens} text tokens, {question_tokens} question tokens")
        show(work.profile_table(rows))
        if sweep is not None:
            show(
                f"Visual tokens at all {len(rows)} m from view tokens: {1e3 * sweep['in_one_pass']:.1f} ms in one pass "
                f"(fuse_every_count), {1e3 * sweep['one_by_one']:.1f} ms one by one."
            )
        if loaded is not None:
            show(
                f"Timed on {next(loaded.parameters()).device}, {str(next(loaded.parameters()).dtype)[6:]}, "
                f"torch {work.torch.__version__}."
            )

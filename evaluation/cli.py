"""`fusedvlm evaluate`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedvlm.console import emit_json, say, show
from fusedvlm.lazy import late_function
from fusedvlm.model_source import require_source

DATA = "LMUData"  # the variable by which VLMEvalKit finds its files
build_tasks = late_function("fusedvlm.evaluation.task_options", "build_tasks")
run_evaluation = late_function("fusedvlm.evaluation.run_evaluation", "run_evaluation")
fusion_inputs = late_function("fusedvlm.evaluation.run_evaluation", "fusion_inputs")
parse_counts = late_function("fusedvlm.evaluation.task_options", "parse_counts")
vlmeval_tasks = late_function("fusedvlm.evaluation.task_options", "vlmeval_tasks")
run_lmms = late_function("fusedvlm.evaluation.harnesses.lmms_run", "run_lmms")
output_folder = late_function("fusedvlm.evaluation.run_evaluation", "output_folder")
make_endpoint = late_function("fusedvlm.data.generate.llm_client", "Endpoint")
split_list = late_function("fusedvlm.evaluation.task_options", "split_list")
latency_lines = late_function("fusedvlm.evaluation.run_evaluation", "latency_lines")
score_lines = late_function("fusedvlm.evaluation.run_evaluation", "score_lines")
# Of a higher layer, which reads what is measured here.
against_paper = late_function("fusedvlm.scaling.against_paper", "against_paper")
paper_cells = late_function("fusedvlm.scaling.against_paper", "paper_cells")
cell_lines = late_function("fusedvlm.scaling.against_paper", "cell_lines")
cell_document = late_function("fusedvlm.scaling.against_paper", "cell_document")


def evaluate(
    model: Annotated[str, typer.Argument(help="Variant folder, family folder or Hub repository.", metavar="MODEL")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Between commas: benchmarks of the paper by name (POPE, TextVQA_VAL, ...), .tsv or .jsonl files, "
            "folders or Hub ids of datasets (OWNER/NAME@SPLIT). A metric may follow: docs.tsv:anls."
        ),
    ],
    counts: Annotated[
        str | None,
        typer.Option(
            "--m",
            "-m",
            "--num-visual-tokens",
            help="Numbers of visual tokens between commas, such as 1,8,64; the variants' own by default.",
        ),
    ] = None,
    harness: Annotated[
        str, typer.Option(help="Whose data, prompts and scores: local, vlmevalkit or lmms-eval (make env-...).")
    ] = "local",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmarks' files, NAME.tsv; $LMUData or ~/LMUData by default.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Prompts, caps and scores of benchmarks: paper, or plain (the question as it stands).")
    ] = "paper",
    bare_question: Annotated[
        bool,
        typer.Option("--bare-question", help="The fusion module reads the question without options and instructions."),
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Cap of an answer, in place of the task's.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First questions of each task only; marked in the results.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results.json and evaluation/; MODEL's own folder by default."),
    ] = None,
    view_cache: Annotated[
        Path | None, typer.Option(help="Keep view tokens in this folder, in 16 bits, for later runs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions fused, and answers decoded, together.")] = 32,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the repository.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; the checkpoint's own by default.")] = "auto",
    base_url: Annotated[
        str | None,
        typer.Option(help="Ask a server instead, up to and with /v1; MODEL is the name that it knows the model by."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the server at a time.")] = 8,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = "OPENAI_API_KEY",
    measured: Annotated[
        int | None,
        typer.Option(
            "--measure",
            min=1,
            help="Also time every m, over so many pictures (the paper: 500).",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="paper: set the scores beside the paper's, and say where they differ.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score a variant or a family on benchmarks and your own questions, at every m in one pass.

    Pictures go through the vision tower once and the fusion reads each question once for all m. A killed run goes on
    where it was when the same command is given again. Scores go into results.json, where cards, `fusedvlm scaling` and
    `fusedvlm plan` read them; every answer into evaluation/ beside it.

    \b
    Examples:
      fusedvlm evaluate runs/quickstart --tasks POPE,TextVQA_VAL --data LMUData --m 1,8,32
      fusedvlm evaluate YOU/fusedvlm-m64 --tasks mine.jsonl:exact_match --json
      fusedvlm evaluate fusedvlm-m64 --base-url http://localhost:8000/v1 --tasks POPE --m 1,8,64
      torchrun --nproc-per-node 8 -m fusedvlm.cli evaluate runs/mine --tasks SEEDBench2 --num-visual-tokens 1,8,64
    """
    if base_url is None:
        require_source("MODEL", model)
    wanted, names = parse_counts(counts), split_list(tasks, "--tasks")
    folder = data or Path(os.environ.get(DATA) or Path.home() / "LMUData")
    others = {
        "--base-url": base_url,
        "--against": against,
        "--measure": measured,
        "--view-cache": view_cache,
        "--max-new-tokens": max_new_tokens,
        "--bare-question": bare_question or None,
        "--revision": revision,
        "--data": data,
        "--dtype": None if dtype == "auto" else dtype,
        "--preset": None if preset == "paper" else preset,
    }
    require_harness(harness, preset, limit, [name for name, value in others.items() if value is not None])
    if harness == "lmms-eval":
        results, rows, path = run_lmms(
            model, names, wanted, output, {"limit": limit, "device": device, "batch_size": batch_size}
        )
        tell(results, rows, path, model, json_output, None)
        return
    if harness == "vlmevalkit":
        place = (output or Path(output_folder(model, None))) / "evaluation"
        built = vlmeval_tasks(names, folder, place, bare_question, max_new_tokens)
    else:
        built = build_tasks(names, folder, preset, bare_question, limit, max_new_tokens)
    require_cells(against, [task.name for task in built])
    options: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype, "concurrency": concurrency}
    options["measured"] = measured
    if base_url is not None:
        if measured is not None:
            raise ValueError("--measure times the weights here, not a server; leave --base-url out.")
        options["endpoint"] = make_endpoint(base_url, model, api_key_env)
    command = shlex.join(["fusedvlm", *sys.argv[1:]])
    done = run_evaluation(model, built, wanted, output, command, view_cache, batch_size, **options)
    if done is None:
        return  # another process of this run tells the results
    results, rows, path = done
    tell(results, rows, path, model, json_output, against)


def tell(
    results: dict[str, Any], rows: list[Any], path: Path, model: str, json_output: bool, against: str | None
) -> None:
    """Show results, beside the paper's where that is asked."""
    kind = fusion_inputs(model) if against else ""
    cells = against_paper(rows, kind) if against else []
    if json_output:
        compared = {"against_paper": cell_document(cells, kind)} if against else {}
        emit_json({"model": model, "results": str(path), **results, **compared})
        return
    for line in [*score_lines(rows), *latency_lines(results), *(cell_lines(cells, kind) if against else [])]:
        show(line)
    say(f"Scores in {path}; answers in {path.parent / 'evaluation'}.")


def require_harness(harness: str, preset: str, limit: int | None, others: list[str]) -> None:
    """Raise `ValueError` for a harness that there is none of, or options that it does not take.

    Args:
        harness, preset, limit: as given.
        others: options that lmms-eval has no place for and that were given.
    """
    if harness not in ("local", "vlmevalkit", "lmms-eval"):
        raise ValueError(f"--harness {harness}: there are local, vlmevalkit and lmms-eval.")
    if harness == "vlmevalkit" and (limit is not None or preset != "paper"):
        raise ValueError("--harness vlmevalkit scores whole sets by its own prompts; leave --limit and --preset out.")
    if harness == "lmms-eval" and others:
        raise ValueError(f"--harness lmms-eval has its own data, prompts and caps; leave {', '.join(others)} out.")


def require_cells(against: str | None, names: list[str]) -> None:
    """Raise `ValueError` for a comparison with nothing, before anything is measured for it."""
    if against is None:
        return
    if against != "paper":
        raise ValueError(f"--against {against}: there is only paper, the scores that the paper reports.")
    known = {benchmark for benchmark, _, _ in paper_cells()}
    if not known & set(names):
        raise ValueError(f"--against paper: {', '.join(names)[:100]} is none of its benchmarks.")

"""`fusedvlm scaling fit | divergence | optimal | report` and `fusedvlm plan`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fusedvlm import scaling as lab
from fusedvlm.console import emit_json, progress, say, show
from fusedvlm.files import write_json
from fusedvlm.model_source import require_source
from fusedvlm.scaling import report as tables

from .score_records import group_curves, read_trainings

app = typer.Typer(
    help="How much a visual token buys: fits, divergence, trade-offs and a report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="Points to leave out, e.g. 'benchmark=RealWorldQA,m=384|512'. Repeatable."),
]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="A column that does not group. Repeatable.")]
Plot = Annotated[Path | None, typer.Option(help="Write the figure here (png, svg or pdf).")]


@app.command()
def fit(
    results: Annotated[
        list[str],
        typer.Argument(
            help="CSV or JSON of scores, a results.json, or 'paper'; of several trainings.", metavar="FILE..."
        ),
    ],
    exclude: Exclude = None,
    ignore: Ignore = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    plot: Plot = None,
    json_output: Json = False,
) -> None:
    """Fit S(m) = c / m^alpha to every benchmark, with intervals and rival laws.

    The file has columns benchmark, metric, m, score; every further column groups. alpha is negative where scores rise
    with m: doubling m multiplies the score by 2^-alpha. The rival laws a + b log m and s_inf - a / m^b are ranked by
    AICc; the held-out error says how well a law predicts an m it has not seen. Several files are several trainings of
    the same: beneath the table stands how far alpha moves from one to the next, beside what sampling leaves open.

    \b
    Examples:
      fusedvlm scaling fit paper
      fusedvlm scaling fit results.csv --plot curves.png
      fusedvlm scaling fit runs/quickstart/seed0/results.json runs/quickstart/seed1/results.json
      fusedvlm scaling fit paper --exclude "benchmark=RealWorldQA,m=384|512" --json
    """
    curves = group_curves(read_trainings(results, ignore or ()), exclude or ())
    fits = [lab.fit_curve(curve, confidence, resamples, seed) for curve in progress(curves, "fitting", leave=False)]
    if plot is not None:
        lab.save_figure(tables.fitted_curves(fits), plot)
        say(f"Figure: {plot}")
    if json_output:
        emit_json(tables.fit_document(" ".join(results), fits))
    else:
        show(tables.fit_table(fits))


@app.command()
def divergence(
    model: Annotated[str, typer.Option(help="Causal LM or FusedVLM variant: folder or Hub repository.")],
    dataset: Annotated[str, typer.Option(help="Pairs: Hub data set, folder, .jsonl, .json, .csv, .parquet.")],
    split: Annotated[str, typer.Option(help="Split of a Hub data set or folder.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the model.")] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most so many rows.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest n; m for a FusedVLM.")] = 800,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per forward pass.")] = 4,
    beta: Annotated[float, typer.Option(help="Performance grows as E[D]^beta; scales alpha(n).")] = 1.0,
    reading: Annotated[str, typer.Option(help="mean, or positive_part: Definition 1's worst case.")] = "mean",
    min_pairs: Annotated[int, typer.Option(min=1, help="Report n only where so many pairs are long enough.")] = 1,
    state: Annotated[Path | None, typer.Option(help="Save progress here and continue from it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON document here, for `report`.")] = None,
    plot: Plot = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    json_output: Json = False,
) -> None:
    """Measure how fast two branches of a prompt drift apart in a model's last hidden states.

    Reports E[D(n)] with its deviation, the dependency measures psi, Upsilon, the fitted lambda, n_balance and alpha(n).
    Pairs are two answers to one prompt (columns chosen and rejected, with prompt or question and system); for a
    FusedVLM they are two images under one question (columns image_a, image_b, question). A run with --state can be
    killed and started again; `accelerate launch -m fusedvlm.cli scaling divergence ...` shares the rows between
    processes.

    \b
    Examples:
      fusedvlm scaling divergence --model Qwen/Qwen2-0.5B-Instruct --dataset Intel/orca_dpo_pairs --limit 500
      fusedvlm scaling divergence --model DIR --dataset pairs.jsonl --state run.npz --output divergence.json
    """
    require_source("--model", model, "config.json")
    from fusedvlm.scaling.divergence.measurement import Request, measure_divergence
    from fusedvlm.scaling.report.divergence_output import write_divergence

    measured = measure_divergence(
        Request(
            model=model,
            dataset=dataset,
            split=split,
            revision=revision,
            dataset_revision=dataset_revision,
            limit=limit,
            max_tokens=max_tokens,
            batch_size=batch_size,
            beta=beta,
            reading=reading,
            min_pairs=min_pairs,
            state=state,
            dtype=dtype,
            device=device,
        )
    )
    if measured is not None:
        write_divergence(*measured, output, plot, json_output)


@app.command()
def optimal(
    grid: Annotated[
        Path | None, typer.Argument(help="CSV: llm_params_b, num_visual_tokens, score. Published grid by default.")
    ] = None,
    task: Annotated[str, typer.Option(help="Rows to use where the file has a column task.")] = "reasoning",
    text_tokens: Annotated[int, typer.Option(min=0, help="Q: text tokens computed per question.")] = 0,
    convention: Annotated[str, typer.Option(help="T is 'vision' tokens or 'vision+text'.")] = "vision",
    budget: Annotated[str | None, typer.Option(help="FLOPs of one question, e.g. '1 TFLOPs'.")] = None,
    max_visual_tokens: Annotated[int, typer.Option(min=1, help="Largest V to consider.")] = 576,
    d_max: Annotated[float, typer.Option(help="Upper bound of the floor D; the lower is 0.")] = 0.3,
    plot: Plot = None,
    json_output: Json = False,
) -> None:
    """Fit error = A / (N^alpha T^beta) + D over LLM sizes N and tokens T, and choose V for a budget.

    Cost is 2 N (Q + V) FLOPs. When alpha is larger than beta a parameter buys more than a token, and the best V is
    about Q beta / (alpha - beta), whatever the budget.

    \b
    Examples:
      fusedvlm scaling optimal --text-tokens 50
      fusedvlm scaling optimal --text-tokens 50 --budget "1 TFLOPs" --plot tradeoff.png
      fusedvlm scaling optimal grid.csv --task ocr --json
    """
    cells = lab.read_grid(grid, task) if grid else lab.read_grid(task=task)
    fitted = lab.fit_tradeoff(cells, convention, text_tokens, (0.0, d_max))
    best = lab.optimal_visual_tokens(fitted, text_tokens, max_visual_tokens)
    choices = []
    if budget is not None:
        limit = lab.parse_budget(budget)
        if limit.field != "tflops":
            raise ValueError(f"Budget {budget!r} is a time; this trade-off counts FLOPs, e.g. '1 TFLOPs'.")
        sizes = sorted({cell.llm_params_b for cell in cells})
        choices = lab.choices_for_budget(fitted, limit.amount * 1e12, sizes, text_tokens, max_visual_tokens)
    for warning in fitted.warnings:
        say(f"Warning: {warning}")
    if plot is not None:
        lab.save_figure(tables.tradeoff_plot(cells, fitted), plot)
        say(f"Figure: {plot}")
    if json_output:
        record = {"fit": asdict(fitted), "optimal_visual_tokens": best, "choices": [asdict(c) for c in choices]}
        emit_json(record)
    else:
        show(tables.tradeoff_text(fitted, best, choices))


@app.command()
def calibrate(
    results: Annotated[
        Path, typer.Argument(help="JSON lines of questions and their scores, or a quickstart's family.", metavar="FILE")
    ],
    variant: Annotated[
        list[Path] | None, typer.Option("--variant", help="Put it into this variant's processor. Repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the calibration here.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Expected loss at which a smaller m is chosen.")] = 0.01,
    held_out: Annotated[float, typer.Option(min=0.1, max=0.9, help="Share of the questions to measure on.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write it even where it is not worth it.")] = False,
    json_output: Json = False,
) -> None:
    """Fit num_visual_tokens="auto": m chosen from the question alone, before any image is read.

    Each line of the file is {"question": text, "scores": {"1": 0.0, "8": 1.0}}: one question with its score at every m
    of yours. The words of one half of them say what to expect at each m; on the other half the command measures how
    many visual tokens that saves, and what it loses against the largest m. It is written only where it saves 30 % or
    more and loses no more than a point; otherwise the numbers are printed and the exit code is 1.

    \b
    Examples:
      fusedvlm scaling calibrate runs/quickstart --variant runs/quickstart/fusedvlm-m32
      fusedvlm scaling calibrate asked.jsonl --output calibration.json
    """
    if not results.exists():
        raise ValueError(f"{results}: no such file or folder; give JSON lines of questions and their scores at each m.")
    from fusedvlm.scaling.tradeoff import calibrate as auto

    record, saving = auto.calibrate(auto.read_asked_questions(results), tolerance, held_out, seed)
    is_written = saving.is_worth_it or force
    if is_written:
        for folder in variant or ():
            auto.install(record, folder)
        if output is not None:
            write_json(output, record)
    if json_output:
        emit_json({"kind": "calibration", "is_worth_it": saving.is_worth_it, "is_written": is_written, **record})
    else:
        show(auto.saving_text(saving))
    if not is_written:
        say(f"Not worth it, so nothing was written: it should save {auto.SAVES:.0%} and lose at most {auto.LOSES:g}.")
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="Folder with scores, divergences, grids; or 'paper'.", metavar="DIR")],
    output: Annotated[Path | None, typer.Option(help="The page; DIR/scaling.html by default.")] = None,
    exclude: Exclude = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = 2000,
    json_output: Json = False,
) -> None:
    """Make one self-contained HTML page of everything in a folder.

    It reads score tables (CSV or JSON as for `fit`), results.json of evaluations, divergence documents, trade-off grids
    and tables of other models (columns model, benchmark, score), each recognized by its columns, and says what it
    left out.

    \b
    Examples:
      fusedvlm scaling report runs/quickstart
      fusedvlm scaling report paper --output scaling.html --exclude "benchmark=RealWorldQA,m=384|512"
    """
    from fusedvlm.scaling.report.scaling_report import collect, write_report

    material = collect(folder, exclude or ())
    for name, reason in material.left_out.items():
        say(f"Left out {name}: {reason}")
    page = output or (Path("scaling.html") if folder == "paper" else Path(folder) / "scaling.html")
    summary = write_report(material, page, resamples)
    if json_output:
        emit_json(summary)
    else:
        show(f"Report: {page}")


def plan(
    budget: Annotated[str, typer.Option(help="'2 TFLOPs', '500 GFLOPs', '150 ms', '0.2 s'.")],
    task: Annotated[str, typer.Option(help="ocr, reasoning or caption: whose benchmarks to predict.")] = "reasoning",
    fits: Annotated[str, typer.Option(help="Scores or `scaling fit --json` output; the paper's by default.")] = "paper",
    costs: Annotated[
        Path | None, typer.Option(help="JSON list of {num_visual_tokens, tflops, latency_ms, llm}; counted by default.")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option("--benchmark", help="Predict these instead of a task's. Repeatable.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option("--group", help="Select column=value among the scores. Repeatable.")
    ] = None,
    scope: Annotated[str, typer.Option(help="FLOPs to count: llm (prefill), fusion (+ llm), all (+ vision).")] = "llm",
    text_tokens: Annotated[int, typer.Option(min=0, help="Text tokens of the prompt, for counted FLOPs.")] = 35,
    views: Annotated[int, typer.Option(min=1, help="Views of the image, for counted FLOPs.")] = 10,
    resamples: Annotated[int, typer.Option(min=20, help="Bootstrap resamples of the interval.")] = 200,
    json_output: Json = False,
) -> None:
    """Choose the number of visual tokens (and the LLM) that scores best within a budget.

    Without --costs, FLOPs are counted for the paper's shapes; --scope says which parts count against the budget. A
    budget in time needs --costs with measured latency_ms. The LLM is chosen where costs and scores name several.

    \b
    Examples:
      fusedvlm plan --budget "2 TFLOPs" --task ocr
      fusedvlm plan --budget "150 ms" --task caption --costs costs.json
      fusedvlm plan --budget "9 TFLOPs" --scope all --fits fits.json --group "fusion_inputs=vision+queries (ft)"
    """
    limit = lab.parse_budget(budget)
    groups = group or (["fusion_inputs=vision+question+queries"] if fits == "paper" else [])
    curves = lab.read_curves(fits, task, benchmark or (), groups)
    if costs is not None:
        options = lab.read_costs(costs, limit.field)
    elif limit.field == "latency_ms":
        raise ValueError("A budget in time needs --costs FILE with measured latency_ms; FLOPs alone give no time.")
    else:
        options = tables.counted_costs(curves, scope, views, text_tokens)
    made = lab.make_plan(curves, options, limit, resamples=resamples)
    if json_output:
        emit_json(tables.plan_document(made, task, fits, None if costs else scope))
    else:
        show(tables.plan_text(made, None if costs else scope))

"""`fusedvlm quickstart`."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusedvlm.console import emit_json, say, show

from .settings import PRESETS

if TYPE_CHECKING:
    from .family import Family


def quickstart(
    output: Annotated[Path, typer.Option(help="Where the family and its report go.")] = Path("runs/quickstart"),
    minutes: Annotated[float | None, typer.Option(min=3, help="Clock budget per seed; 6 on the CPU preset.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train so many families, to see the spread of the fit.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first family; the others count on from it.")] = 0,
    preset: Annotated[str, typer.Option(help="cpu or gpu: sizes and step counts.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the training process.")] = 1,
    fuse_question: Annotated[
        bool,
        typer.Option(
            "--fuse-question/--no-fuse-question",
            help="Whether the fusion module reads the question; without it, by the unconditioned recipe.",
        ),
    ] = True,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Afterwards train the same towers without the question, with equal compute: three times as long.",
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train a small family of variants from scratch, ask it questions, and report what each visual token buys.

    Renders its own images, pretrains a tiny language model on text and freezes it, warms up the vision tower, runs both
    training stages (stage 2: one-word questions until their loss has fallen, then every kind of question with m drawn
    from 1 to 32), evaluates on held-out images at every m, between them and in second turns, saves one variant per m
    and loads each back through AutoModelForImageTextToText.

    On two idle cores it takes about six minutes. On a busy machine it ends on time too and says what the clock cut:
    give it more with --minutes.

    Example: fusedvlm quickstart --compare

    Example: fusedvlm quickstart --minutes 12 --seeds 3
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; presets are {', '.join(PRESETS)}.")
    output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is no news for after the training
    import torch

    from .family_report import second_turn_table, summary, write_report, write_scaling_pages
    from .run import run

    torch.set_num_threads(threads)
    settings = PRESETS[preset]
    if not fuse_question:
        if compare:
            raise ValueError("--compare sets a family with the question beside others: leave --no-fuse-question out.")
        settings = settings.without_question()
    if minutes is not None:
        settings = replace(settings, minutes=minutes)
    command = shlex.join(["fusedvlm", *sys.argv[1:]])
    families = []
    for seed in range(first_seed, first_seed + seeds):
        folder = output if seeds == 1 else output / f"seed{seed}"
        say(f"Seed {seed}: training a family in {folder} (budget {settings.minutes:g} minutes).")
        families.append(run(replace(settings, seed=seed), folder, command, with_comparison=compare))
    report = write_report(families, output)
    pages = write_scaling_pages(families)
    if json_output:
        emit_json(summary(families, report))
        return
    for family in families:
        show(_answers(family))
    show(_table(families, first_seed))
    for family in families:
        if family.second_turns:
            show("\n".join(second_turn_table(family)))
        if family.comparison is not None:
            show("\n".join(family.comparison.table()))
    show(f"Report: {report}")
    show(f"Scaling: {', '.join(map(str, pages))}")
    show(
        f"Ask it yourself: fusedvlm describe IMAGE --question 'list all objects' --model {families[0].variant_folder()}"
    )


def _answers(family: "Family") -> str:
    """The questions asked of the variants that were loaded back, as text."""
    lines = ["Asked through AutoModelForImageTextToText:"]
    for example in family.examples:
        lines.append(f"  Q: {example['question']}   (right: {example['expected']})")
        lines += [f"     m={m:<3} {answer}" for m, answer in example["answers"].items()]
    return "\n".join(lines)


def _table(families: "list[Family]", first_seed: int = 0) -> str:
    """Mean score at each m, beside the score on swapped images."""
    lines = ["Mean score over all tasks, held-out images (beside it: each question with another question's image):"]
    for number, family in enumerate(families, first_seed):
        swapped = family.mean_scores(swapped=True)
        cells = "  ".join(f"m={m}: {score:.3f} ({swapped[m]:.3f})" for m, score in family.mean_scores().items())
        lines.append(f"  seed {number}  {cells}")
        if family.fit is None:
            lines.append("          no fit: a mean score is zero")
        else:
            fit = family.fit
            law = f"          S(m) = {fit.c:.3f} / m^{fit.alpha:.3f}, R^2 {fit.r2:.3f}"
            if fit.alpha_interval is not None:  # two m fix a law, and leave nothing to judge it by
                law += ", {:.0%} interval of alpha [{:.3f}, {:.3f}]".format(fit.confidence, *fit.alpha_interval)
            lines.append(f"{law}; by the standard errors: {family.verdict}")
    return "\n".join(lines)

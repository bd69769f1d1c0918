"""`fusedvlm train`: the three stages from recipes."""

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from fusedvlm.console import say, show, useful_line
from fusedvlm.trainers.recipes.command_words import check_places, read_recipe
from fusedvlm.trainers.recipes.recipe_files import STAGES, did_you_mean, shipped_presets, shipped_recipes

# Words belong to TRL's parser: this module only sorts them by stage and answers --help.
HELP = Path(__file__).parent / "recipes" / "help"  # written by recipe_help: its fields take seconds to import
WORDS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

train = typer.Typer(
    help="Train a stage from a recipe: contrastive, then generation, then variants.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@train.command("contrastive", context_settings=WORDS)
def contrastive(context: typer.Context) -> None:
    """Stage 1: the fusion state of a question about an image against its answer."""
    run_words(["contrastive", *context.args])


@train.command("generation", context_settings=WORDS)
def generation(context: typer.Context) -> None:
    """Stage 2: answer through the frozen LLM; with `--config elastic` for every m at once."""
    run_words(["generation", *context.args])


@train.command("variants", context_settings=WORDS)
def variants(context: typer.Context) -> None:
    """Stage 3: one variant per (m, m') from the stage-2 weights; finished ones are skipped."""
    run_words(["variants", *context.args])


@train.command("recipes")
def recipes() -> None:
    """List the shipped recipes and presets."""
    for title, files in (("Recipes (--config)", shipped_recipes()), ("Presets (--preset)", shipped_presets())):
        show(title)
        for name, path in files.items():
            show(f"  {name:<12} {first_comment(path.read_text(encoding='utf-8'))}")


def first_comment(text: str) -> str:
    """The first sentence of the comment a YAML file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).split(". ")[0].rstrip(".") + "."


def run_words(words: Sequence[str]) -> None:
    """A stage and its words: help, a resolved recipe, or a run.

    Raises:
        ValueError: for a stage that does not exist, and for mistakes in the words.
    """
    if not words or words[0] not in STAGES:
        asked = words[0] if words else ""
        raise ValueError(f"Name a stage: {did_you_mean(asked, STAGES)}")
    stage, rest = words[0], list(words[1:])
    if any(word in ("-h", "--help", "--help-all") for word in rest):
        written = HELP / f"{stage}.txt"
        if "--help-all" not in rest and written.exists():
            show(written.read_text(encoding="utf-8").rstrip("\n"))
            return
        from fusedvlm.trainers.recipes.recipe_help import stage_help

        show(stage_help(stage, everything="--help-all" in rest))
        return
    recipe, only_print = read_recipe(stage, rest)
    if not only_print:
        check_places(recipe)
    from fusedvlm.trainers.runs.run_recipe import run_stage

    run_stage(recipe, only_print)


def main(words: Sequence[str] | None = None) -> None:
    """`STAGE [--config FILE] [--preset NAME] [--field value ...]`; see `fusedvlm train STAGE --help`."""
    try:
        run_words(list(sys.argv[1:] if words is None else words))
    except ValueError as error:
        say(f"fusedvlm: {useful_line(error)}")
        sys.exit(2)

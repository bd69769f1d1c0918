"""Run a recipe: the same code behind `fusedvlm train`, `accelerate launch -m fusedvlm.trainers` and Python.

run_recipe(load_recipe("generation", preset="single_gpu"))
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging

from fusedvlm.console import show
from fusedvlm.trainers.interruption import StopSignals, TrainingInterrupted
from fusedvlm.trainers.recipes.recipe_files import Recipe, load_recipe, merge
from fusedvlm.trainers.recipes.recipe_parsing import plan_run

from .run_record import read_record
from .train import tell, train_stage
from .variants import train_variants

FINAL = "final"
# What the shipped recipe `elastic` says of m, and what it said before it drew every integer.
ELASTIC_NOW = [1, 768]
ELASTIC_BEFORE = [1, 8, 16, 32, 64, 128, 256, 384, 512, 768]
TITLES = {"contrastive": "stage 1 (contrastive)", "generation": "stage 2 (generation)"}


def run_recipe(
    recipe: Recipe | str | Path, preset: str | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> Path | list[Path]:
    """Carry a recipe out, or continue it where it stopped.

    Args:
        recipe: a recipe, the name of a shipped one, or the path of a file.
        preset: merged over it when it is a name or path.
        callbacks: further trainer callbacks.

    Returns:
        The folder of the finished model, which `from_pretrained` loads; of every variant at stage 3.

    Raises:
        ValueError: for settings that cannot work, and for an output folder that holds another run.
        TrainingInterrupted: after SIGTERM or SIGINT; nothing is published then.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, preset)
    recipe = as_begun(recipe)
    plan = plan_run(recipe)
    with StopSignals(f"{recipe.stage} before it was finished; nothing was published, and the same command goes on"):
        if recipe.stage == "variants":
            return train_variants(plan, callbacks)
        output_dir = Path(plan.training.output_dir)
        return train_stage(plan, output_dir, output_dir / FINAL, TITLES[recipe.stage], callbacks)


def as_begun(recipe: Recipe) -> Recipe:
    """The recipe, with the counts of m that `elastic` listed when the run in its folder was begun.

    The shipped recipe draws every integer today; a run under way goes on as it began.
    """
    training = recipe.sections.get("training", {})
    if training.get("elastic_range") != ELASTIC_NOW or training.get("elastic_num_visual_tokens") is not None:
        return recipe
    folder = recipe.resolved().sections["training"].get("output_dir")
    record = read_record(Path(folder)) if folder else None
    begun = {} if record is None else record["recipe"].get("training", {})
    if begun.get("elastic_range") is not None or begun.get("elastic_num_visual_tokens") != ELASTIC_BEFORE:
        return recipe
    tell(f"The run in {folder} goes on with the counts of m that it was begun with.")
    sections = merge(recipe.sections, {"training": {"elastic_num_visual_tokens": ELASTIC_BEFORE}})
    return Recipe(recipe.stage, sections, recipe.source)


def run_stage(recipe: Recipe, only_print: bool = False) -> None:
    """What the command line asks for: print the resolved recipe, or carry it out and show the folders it made."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # ours shows the steps; theirs, every file that is read or written
    if only_print:
        check = Recipe(recipe.stage, merge(recipe.sections, {"training": {"use_cpu": True}}), recipe.source)
        plan_run(check)  # a recipe for GPUs can be printed without one
        if PartialState().is_main_process:
            show(recipe.to_yaml().rstrip())
        return
    try:
        result = run_recipe(recipe)
    except TrainingInterrupted as error:
        tell(str(error))
        sys.exit(error.exit_code)
    if PartialState().is_main_process:
        for folder in result if isinstance(result, list) else [result]:
            show(str(folder))

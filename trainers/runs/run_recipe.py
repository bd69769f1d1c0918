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
from fusedvlm.trainers.recipes.recipe_parsing import plan_run, read_recipe

from .train import tell, train_stage
from .variants import train_variants

FINAL = "final"
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
    plan = plan_run(recipe)
    with StopSignals(f"{recipe.stage} before it was finished; nothing was published, and the same command goes on"):
        if recipe.stage == "variants":
            return train_variants(plan, callbacks)
        output_dir = Path(plan.training.output_dir)
        return train_stage(plan, output_dir, output_dir / FINAL, TITLES[recipe.stage], callbacks)


def run_stage(stage: str, words: Sequence[str]) -> None:
    """What the command line asks for: print the resolved recipe, or carry it out and show the folders it made."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # ours shows the steps; theirs, every file that is read or written
    recipe, only_print = read_recipe(stage, words)
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

"""Stage 3: one variant per (m, m') and kind of fusion input, each from the same stage-2 weights.

Every variant is a run of its own with its own seed, so it does not matter which were finished earlier: interrupted,
the command continues with the variant it was at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from fusedvlm.trainers.recipes.recipe_files import Recipe, merge
from fusedvlm.trainers.recipes.recipe_parsing import RunPlan, world_size
from fusedvlm.trainers.recipes.run_arguments import QUESTION_CHOICES

from .run_record import describe_run, write_record
from .train import train_stage


@dataclass(frozen=True)
class Variant:
    """One variant: m, m', and whether its fusion module reads the question."""

    num_visual_tokens: int
    num_followup_visual_tokens: int
    fuse_question: bool

    @property
    def name(self) -> str:
        """Name of its folder: `fusedvlm-m64`, or `fusedvlm-m64-no-question`."""
        return f"fusedvlm-m{self.num_visual_tokens}{'' if self.fuse_question else '-no-question'}"


def list_variants(plan: RunPlan) -> list[Variant]:
    """All variants of a plan, with the question first."""
    arguments: Any = plan.variants  # after parsing: pairs of numbers
    kinds = QUESTION_CHOICES[arguments.fuse_question]
    return [Variant(m, followup, question) for question in kinds for m, followup in arguments.pairs]


def train_variants(plan: RunPlan, callbacks: Sequence[TrainerCallback] = ()) -> list[Path]:
    """Make every variant that is not finished yet; returns all their folders.

    Raises:
        ValueError: when there are no stage-2 weights to start from.
    """
    if plan.model.model_name_or_path is None:
        raise ValueError("Stage 3 starts from stage-2 weights: set model.model_name_or_path to their folder.")
    output_dir = Path(plan.training.output_dir)
    variants = list_variants(plan)
    if PartialState().is_main_process:
        record = describe_run(plan.recipe, None, world_size())
        write_record(output_dir, {**record, "variants": [variant.name for variant in variants]})
    folders = []
    for number, variant in enumerate(variants, start=1):
        folders.append(
            train_stage(
                plan_variant(plan, variant),
                work=output_dir / "work" / variant.name,
                target=output_dir / variant.name,
                title=f"{variant.name} ({number} of {len(variants)})",
                callbacks=callbacks,
            )
        )
    return folders


def plan_variant(plan: RunPlan, variant: Variant) -> RunPlan:
    """The plan of one variant: stage 2 at its m, m' and kind of fusion input."""
    dial: dict[str, Any] = {
        "num_visual_tokens": variant.num_visual_tokens,
        "num_followup_visual_tokens": variant.num_followup_visual_tokens,
        "fuse_question": variant.fuse_question,
    }
    sections = merge(plan.recipe.sections, {"model": {**dial, "trained_num_visual_tokens": None}})
    sections.pop("variants")
    # A checkpoint's path belongs to one variant; the others find their own.
    resume = plan.run.resume if plan.run.resume in ("auto", "never") else "auto"
    return replace(
        plan,
        recipe=Recipe("variants", sections, plan.recipe.source),
        model=replace(plan.model, **dial, trained_num_visual_tokens=[variant.num_visual_tokens]),
        run=replace(plan.run, resume=resume),
    )

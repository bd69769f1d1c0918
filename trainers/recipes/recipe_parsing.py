"""A recipe and command-line words to typed arguments, through TRL's parser."""

import json
import os
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

from trl import TrlParser

from fusedvlm.wording import fit, shown

from .recipe_files import Recipe
from .run_arguments import DataArguments, ModelArguments, RunArguments, VariantArguments, dataclasses_of

MOST_SAMPLES = 10_000_000  # of a batch; more is a slip of the finger, and its divisors are not looked for
# What `--help` shows of TrainingArguments; `--help-all` shows every field.
ESSENTIAL = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "vision_learning_rate", "freeze", "bf16", "gradient_checkpointing", "seed",
    "logging_steps", "save_steps", "save_total_limit", "dataloader_num_workers", "report_to", "use_cpu",
)  # fmt: skip


@dataclass
class RunPlan:
    """A resolved recipe with its typed arguments. `variants` is None before stage 3."""

    recipe: Recipe
    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: Any
    variants: VariantArguments | None = None


class RecipeParser(TrlParser):
    """TRL's parser whose mistakes are `ValueError`s rather than an exit with a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise ValueError(message)


def plan_run(recipe: Recipe) -> RunPlan:
    """Typed arguments of a recipe, gradient accumulation included.

    Raises:
        ValueError: for a value of the wrong type, or arguments that cannot work together.
    """
    recipe = recipe.resolved()
    kinds = dataclasses_of(recipe.stage)
    known = kinds["model"], kinds["data"], kinds["run"], kinds["training"]
    sections = {name: dict(recipe.sections.get(name) or {}) for name in kinds}
    _check_fuser_config(sections["model"].get("fuser_config"))
    run = _parse(kinds["run"], sections["run"], "run")
    training = {**sections["training"], **_accumulation(run, sections["training"], kinds["training"])}
    model, data, run, arguments = [_parse(kind, values, name) for kind, values, name in zip(
        known, (sections["model"], sections["data"], sections["run"], training), ("model", "data", "run", "training"),
        strict=True,
    )]  # fmt: skip
    variants = _parse(kinds["variants"], sections["variants"], "variants") if "variants" in kinds else None
    return RunPlan(recipe, model, data, run, arguments, variants)


def gradient_accumulation(global_batch_size: int, per_device: int, processes: int) -> int:
    """Micro-batches per optimizer step.

    Raises:
        ValueError: when the global batch is not a whole number of micro-batches, with the nearest that are.
    """
    for name, value in (("global_batch_size", global_batch_size), ("per_device_train_batch_size", per_device)):
        if not 1 <= value <= MOST_SAMPLES:
            raise ValueError(f"{name}={shown(value)} must be at least 1, and at most {MOST_SAMPLES:,}.")
    at_once = per_device * processes
    steps, rest = divmod(global_batch_size, at_once)
    if rest or steps == 0:
        fits = [size for size in range(1, per_device + 1) if global_batch_size % (size * processes) == 0]
        sizes = f"per_device_train_batch_size={fits[-1]}" if fits else "another number of processes"
        raise ValueError(
            f"global_batch_size={global_batch_size} is no multiple of {per_device} samples x {processes} processes = "
            f"{at_once}; use {sizes}, or global_batch_size={max(1, round(global_batch_size / at_once)) * at_once}."
        )
    return steps


def world_size() -> int:
    """Processes of this run, as the launcher (torchrun, accelerate) states them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _accumulation(run: RunArguments, training: dict, kind: Any) -> dict[str, int]:
    if run.global_batch_size is None:
        return {}
    if training.get("batch_groups") is not None:
        raise ValueError(
            f"run.global_batch_size={run.global_batch_size} and training.batch_groups both say how many samples a step "
            "has: set run.global_batch_size to null."
        )
    fields = kind.__dataclass_fields__
    per_device = _as_int(training.get("per_device_train_batch_size"), fields["per_device_train_batch_size"].default)
    steps = gradient_accumulation(run.global_batch_size, per_device, world_size())
    stated = training.get("gradient_accumulation_steps")
    if stated is not None and _as_int(stated, steps, "gradient_accumulation_steps") != steps:
        raise ValueError(
            f"gradient_accumulation_steps={shown(stated)} contradicts global_batch_size={run.global_batch_size} with "
            f"{per_device} samples x {world_size()} processes, which takes {steps}; state one of the two."
        )
    return {"gradient_accumulation_steps": steps}


def _as_int(value: Any, default: int, name: str = "per_device_train_batch_size") -> int:
    try:
        return default if value is None else int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}={shown(value)} is not a number of samples or steps.") from error


def _parse(kind: Any, values: dict[str, Any], section: str) -> Any:
    """A section's values, stated as command-line words so that a file and a command are read alike."""
    words = []
    for name, value in values.items():
        if value is None:
            continue  # null: the default
        if isinstance(value, list) and _is_plain_list(kind, name):
            words += [f"--{name}", *map(str, value)]
        else:  # in one word, so that -1e-3 is a value and no option
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict | list) else value}")
    parser = RecipeParser([kind], add_help=False, allow_abbrev=False)
    try:
        with warnings.catch_warnings():
            # The name that every supported transformers knows; new ones also have another.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    except ValueError as error:
        raise ValueError(fit(f"{section}: {error}", 240)) from error


def _is_plain_list(kind: Any, name: str) -> bool:
    """Whether argparse takes the field as several words (list[str]) rather than as one JSON word."""
    text = str(kind.__dataclass_fields__[name].type)
    return "list[" in text and "dict" not in text and "list[list" not in text


def _check_fuser_config(given: Any) -> None:
    from fusedvlm.modeling_fusedvlm import FusedVLMFuserConfig

    from .recipe_files import did_you_mean

    known = list(FusedVLMFuserConfig().to_dict())
    for name in given if isinstance(given, dict) else ():
        if name not in known:
            raise ValueError(f"model.fuser_config: {did_you_mean(name, known)}")

"""`fusedvlm train STAGE --help`: the fields of a recipe by section, short unless asked for all of them.

The short pages are written down, for their fields come from transformers' trainer, whose import takes seconds:
`python -m fusedvlm.trainers.recipes.recipe_help` writes them again, and a test compares them.
"""

import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path

from .recipe_files import STAGES
from .recipe_parsing import ESSENTIAL
from .run_arguments import dataclasses_of

USAGE = """\
fusedvlm train {stage} [--config RECIPE] [--preset NAME] [--FIELD VALUE ...]

  fusedvlm train {stage} --preset cpu_smoke --data.sources.0.path data.jsonl
  fusedvlm train {stage} --config mine.yaml --learning_rate 1e-5 --model.fuser_config.num_hidden_layers 12
  accelerate launch --config_file ddp.yaml -m fusedvlm.trainers {stage} --config mine.yaml

--config RECIPE   a shipped recipe's name or a YAML file; `{stage}` by default (`fusedvlm train recipes` lists them)
--preset NAME     a shipped preset or a YAML file, merged over the recipe
--print-config    print the resolved recipe and stop
--help-all        every field; without it, of the training section only the usual ones

Every field below can stand in the recipe or on the command line, where it wins: --learning_rate 1e-5, or
--training.learning_rate 1e-5. Dots go into mappings and lists: --data.sources.0.path FILE.
Values shown are the defaults behind the recipe; --print-config shows what the recipe says."""
TITLES = {
    "model": "Model",
    "data": "Data",
    "run": "Run",
    "variants": "Variants",
    "training": "Training (transformers.TrainingArguments and this stage's own)",
}


def stage_help(stage: str, everything: bool = False) -> str:
    """The help page of a stage."""
    parts = [USAGE.format(stage=stage)]
    for section, kind in dataclasses_of(stage).items():
        shown = [entry for entry in fields(kind) if entry.init]
        if section == "training" and not everything:
            from transformers import TrainingArguments

            inherited = set(TrainingArguments.__dataclass_fields__)
            shown = [entry for entry in shown if entry.name not in inherited or entry.name in ESSENTIAL]
            shown.sort(key=lambda entry: entry.name in inherited)
        parts.append("\n".join([f"{TITLES[section]}:", *map(_line, shown)]))
    return "\n\n".join(parts)


def _line(entry: Field) -> str:
    default = entry.default
    if default is MISSING:
        default = entry.default_factory() if entry.default_factory is not MISSING else None
    text = " ".join(str(entry.metadata.get("help", "")).split())
    text += "" if default in (None, []) else f" [{getattr(default, 'value', default)}]"
    name = f"  --{entry.name}"
    body = textwrap.wrap(text, 118, initial_indent=" " * 34, subsequent_indent=" " * 34) or [""]
    first = body[0].strip()
    if len(name) > 32:
        return "\n".join([name, *body])
    return "\n".join([f"{name:<34}{first}", *body[1:]])


def main() -> None:
    """Write the short page of every stage."""
    folder = Path(__file__).parent / "help"
    folder.mkdir(exist_ok=True)
    for stage in STAGES:
        (folder / f"{stage}.txt").write_text(stage_help(stage) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

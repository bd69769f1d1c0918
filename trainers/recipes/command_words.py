"""The words of `fusedvlm train STAGE ...` to a recipe: every name in them is checked before PyTorch is imported."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fusedvlm.data.sources.find_files import require_files
from fusedvlm.model_source import require_source
from fusedvlm.wording import fit, shown

from .recipe_files import Recipe, load_recipe, set_field

RUN_IT_FIRST = "run the stage that writes it first, or correct the path."


def split_command_line(words: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, list[str]]]]:
    """`--config`, `--preset` and flags apart from overrides: ({option: value}, [(dotted name, its words)]).

    Raises:
        ValueError: for a word that belongs to no option.
    """
    options: dict[str, str] = {}
    overrides: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            overrides.append((name, [value] if equals else []))
        elif overrides:
            overrides[-1][1].append(word)
        else:
            raise ValueError(
                f"{shown(word)} belongs to no option; write --config {fit(word, 60)} or --field {fit(word, 60)}."
            )
    for name in ("config", "preset", "print-config"):
        given = [values for key, values in overrides if key.replace("_", "-") == name]
        overrides = [(key, values) for key, values in overrides if key.replace("_", "-") != name]
        if given:
            if len(given[-1]) != (0 if name == "print-config" else 1):
                raise ValueError(f"--{name} takes {'no value' if name == 'print-config' else 'one value'}.")
            options[name] = given[-1][0] if given[-1] else "true"
    return options, overrides


def read_value(words: list[str], inside_mapping: bool) -> Any:
    """Words after an option: none is true, several are a list, `null` the default. Only inside mappings is one YAML."""
    if not words:
        return True
    if words == ["null"]:
        return None
    if len(words) > 1:
        return list(words)
    if inside_mapping or words[0].lstrip().startswith(("{", "[")):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(words[0])
    return words[0]


def read_recipe(stage: str, words: Sequence[str]) -> tuple[Recipe, bool]:
    """The recipe a command line asks for, and whether it is only to be printed.

    Raises:
        ValueError: for mistakes in the recipe or the words; also when the recipe is of another stage.
    """
    options, overrides = split_command_line(words)
    recipe = load_recipe(options.get("config", stage), options.get("preset"))
    if recipe.stage != stage:
        raise ValueError(f"{recipe.source} is a recipe of stage {recipe.stage!r}; run `fusedvlm train {recipe.stage}`.")
    for name, values in overrides:
        set_field(recipe, name, read_value(values, inside_mapping=_is_inside_mapping(name)))
    return recipe, "print-config" in options


def check_places(recipe: Recipe) -> None:
    """Raise `ValueError` for data or a model that is not there, of a run that has not begun.

    A run that has begun is checked as it goes on: what is finished needs its data no more.
    """
    sections = recipe.resolved().sections
    folder = sections.get("training", {}).get("output_dir")
    if isinstance(folder, str) and (Path(folder) / "run.json").exists():
        return
    sources = sections.get("data", {}).get("sources")
    if isinstance(sources, str) and not sources.lstrip().startswith(("[", "{")) and not Path(sources).is_file():
        raise ValueError(f"data.sources={fit(sources, 160)}: no such file.")
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict):
            require_files(source.get("type"), source.get("path"))
    model = sections.get("model", {})
    started_from = model.get("model_name_or_path")
    if isinstance(started_from, str) and model.get("connector") is None:
        require_source("model.model_name_or_path", started_from, "config.json", RUN_IT_FIRST)


def _is_inside_mapping(dotted: str) -> bool:
    parts = dotted.split(".")
    return len(parts) > (2 if parts[0] in ("model", "data", "run", "variants", "training") else 1)

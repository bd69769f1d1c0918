"""Recipes in YAML: typed arguments that read back as the same recipe, or one line that names the file."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from fusedvlm.tests.fuzz.harness import ODD, Target, damaged_bytes, damaged_tree, explore, judge
from fusedvlm.trainers.recipes.recipe_files import load_recipe
from fusedvlm.trainers.recipes.recipe_parsing import plan_run

PART_NAMES = ("model", "data", "run", "training", "variants")


def read_recipe(case: bytes, folder: Path) -> None:
    """Every stated value arrives; what is printed reads back as the same."""
    path = folder / "recipe.yaml"
    path.write_bytes(case)
    recipe = load_recipe(path)
    try:
        plan = plan_run(recipe)
    except ValueError as error:
        # A value's own error names its section and field; the command line puts the file's name in front.
        raise ValueError(f"recipe.yaml: {error}") from error
    for name in PART_NAMES:
        part = getattr(plan, name)
        for entry in fields(part) if part is not None else ():
            value = getattr(part, entry.name)
            assert not (isinstance(value, float) and math.isnan(value)), f"{name}.{entry.name} is not a number"
    again = folder / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again).sections == recipe.sections


def cases(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Damaged documents written as YAML again, and damaged text."""
    documents = [yaml.safe_load(seed) for seed in seeds if seed.strip() and b"<<" not in seed]
    documents = [document for document in documents if isinstance(document, dict)]
    odd = [value for value in ODD if not isinstance(value, str) or value.isascii()]  # half characters are no YAML
    trees = damaged_tree(documents, 3, odd).map(lambda tree: yaml.safe_dump(tree, sort_keys=False).encode())
    return trees | damaged_bytes(seeds, 3)


TARGET = Target("recipes", read_recipe, ("recipe.yaml",), cases)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", TARGET.corpus(), ids=lambda path: path.name)
def test_the_corpus(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = judge(TARGET, path.read_bytes(), tmp_path)
    assert kind == "clean" or not path.name.startswith("seed-")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(0)
def test_damaged_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = explore(TARGET, tmp_path)
    assert seen["clean"]
    assert seen["refused"]

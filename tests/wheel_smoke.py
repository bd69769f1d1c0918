"""What an installed wheel must do by itself: `python tests/wheel_smoke.py` with the Python of an environment that has it.

Knows nothing of the checkout, so a file that did not travel is found here.
"""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

COMMANDS = [
    ["--help"],
    ["--version"],
    ["train", "recipes"],
    ["train", "contrastive", "--help"],
    ["scaling", "fit", "paper"],
    ["plan", "--help"],
]


def import_everything() -> int:
    """Import every module and look up every public name; returns how many names there are."""
    package = importlib.import_module("fusedvlm")
    names = 0
    for found in pkgutil.walk_packages(package.__path__, "fusedvlm."):
        if not found.name.endswith("__main__") and ".templates." not in found.name:  # those run in a Space
            module = importlib.import_module(found.name)
            names += len([getattr(module, name) for name in getattr(module, "__all__", ())])
    return names + len([getattr(package, name) for name in package.__all__])


def check_data_files() -> None:
    """Recipes resolve with their presets, and templates compile."""
    import jinja2

    from fusedvlm.trainers.recipes.recipe_files import load_recipe, shipped_presets, shipped_recipes

    for name in shipped_recipes():
        load_recipe(name)
    assert len(shipped_recipes()) >= 3
    assert len(shipped_presets()) >= 3
    folder = Path(importlib.import_module("fusedvlm").__file__).parent
    templates = [path for path in folder.rglob("*.jinja") if path.parent.name != "processing"]
    assert len(templates) >= 5, templates
    for path in templates:
        jinja2.Environment(autoescape=False).parse(path.read_text(encoding="utf-8"))
    assert (folder / "py.typed").exists()


def check_commands() -> None:
    """The light commands work and say something."""
    command = str(Path(sys.executable).parent / "fusedvlm")
    for words in COMMANDS:
        done = subprocess.run([command, *words], capture_output=True, text=True)
        assert done.returncode == 0, (words, done.returncode, done.stderr)
        assert done.stdout.strip(), words


def main() -> None:
    """Raises `AssertionError`, or whatever an import raises, when the wheel is not whole."""
    assert importlib.util.find_spec("fusedvlm.tests") is None, "the wheel holds tests"
    names = import_everything()
    check_data_files()
    check_commands()
    sys.stdout.write(f"wheel of {importlib.import_module('fusedvlm').__file__}: {names} public names, works\n")


if __name__ == "__main__":
    main()

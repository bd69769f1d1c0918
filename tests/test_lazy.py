"""Public names are what they say, to Python and to type checkers, and wrong ones are refused with the right ones."""

import ast
import importlib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAZY = sorted(path for path in ROOT.glob("*/__init__.py") if "lazy_names(" in path.read_text(encoding="utf-8"))
PACKAGES = ["fusedvlm" if path.parent.name == "fusedvlm" else f"fusedvlm.{path.parent.name}" for path in LAZY]


def names_for_checkers(path: Path) -> dict[str, str]:
    """Public name -> module, from the imports under `if TYPE_CHECKING:` of a package."""
    blocks = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert len(blocks) == 1, path
    found = {}
    for line in blocks[0].body:
        for alias in line.names:
            assert alias.asname == alias.name, f"{alias.name}: write `as {alias.name}`, or checkers take it for private"
            found[alias.name] = "." * line.level + (line.module or "")
    # Without the `else`, checkers see __getattr__ and accept any name.
    assert "lazy_names(" in ast.unparse(blocks[0].orelse[0]), path
    return found


def test_the_lazy_packages_are_found():
    assert {"fusedvlm", "fusedvlm.trainers", "fusedvlm.data", "fusedvlm.scaling", "fusedvlm.hub_cards"} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert not isinstance(getattr(module, name), types.ModuleType), name
    assert set(dir(module)) - set(getattr(module, "_PACKAGES", ())) == set(module.__all__)


@pytest.mark.parametrize(("package", "path"), zip(PACKAGES, LAZY, strict=True), ids=PACKAGES)
def test_type_checkers_see_the_names_that_python_finds(package, path):
    module = importlib.import_module(package)
    assert names_for_checkers(path) == module._PUBLIC


def names_in_annotations(tree: ast.AST) -> set[str]:
    """Names that Python evaluates when it reads the functions and fields of a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
            found += [node.returns, *(argument.annotation for argument in every if argument is not None)]
        elif isinstance(node, ast.AnnAssign):
            found.append(node.annotation)
    return {name.id for part in found if part for name in ast.walk(part) if isinstance(name, ast.Name)}


def test_names_for_type_checkers_alone_stand_in_quotes():
    """An import below `if TYPE_CHECKING:` does not happen, and neither mypy nor ruff notice who needs it."""
    unquoted = {}
    for path in ROOT.glob("*/**/*.py"):
        folder = path.relative_to(ROOT).parts[0]
        if path.name == "__init__.py" or folder.startswith(".") or folder in ("build", "tests"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [
            n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING" and not n.orelse
        ]
        imported = {alias.asname or alias.name for block in blocks for line in block.body for alias in line.names}
        if wrong := imported & names_in_annotations(tree):
            unquoted[path.relative_to(ROOT).as_posix()] = wrong
    assert unquoted == {}


def test_a_wrong_name_is_refused():
    import fusedvlm.scaling

    with pytest.raises(
        AttributeError, match=r"'fusedvlm\.scaling' has no attribute 'nothing'; public names: .*fit_power"
    ):
        fusedvlm.scaling.nothing  # noqa: B018

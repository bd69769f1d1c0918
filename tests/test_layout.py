"""The layout tells the truth: every folder is a package, imports have one identity, public names exist."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

import fusedvlm

ROOT = Path(__file__).parents[1]


def metadata() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


LIBRARY = sorted(
    folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists() and folder.name != "tests"
)
FILES = sorted(path for folder in LIBRARY for path in (ROOT / folder).rglob("*.py"))
# The import rule, from the ground up: a folder may import from its own row's earlier entries and from rows above it.
LAYERS = [
    ["fusedvlm"],
    ["modeling_fusedvlm"],
    ["processing"],
    ["conversion", "costs", "data"],
    ["trainers", "evaluation", "serving", "reducers"],
    ["scaling"],
    ["hub_cards", "hub_double"],
    ["quickstart"],
    ["comparison"],
    ["lab"],
    ["fusedvlm.cli"],
]


def layer_of(module: str) -> int:
    """Row of a dotted module name below `fusedvlm`."""
    if module == "cli":
        return len(LAYERS) - 1
    top = module.split(".")[0]
    return next((row for row, names in enumerate(LAYERS) if top in names), 0)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts[1:] if parts[0] == "fusedvlm" else parts)


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, below `fusedvlm`."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name[9:] for alias in node.names if alias.name.startswith("fusedvlm.")}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            name = (
                name if node.level else name.removeprefix("fusedvlm").lstrip(".") if name.startswith("fusedvlm") else ""
            )
            found |= {f"{name}.{alias.name}" for alias in node.names} if name else set()
    return found


def test_every_python_folder_is_listed_as_a_package():
    setuptools = metadata()["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in FILES}
    mapped = {folder: name for name, folder in setuptools["package-dir"].items()}
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])
    assert folders - set(mapped) == set()
    for folder in folders:
        expected = "fusedvlm" if folder == "fusedvlm" else f"fusedvlm.{folder.replace('/', '.')}"
        assert mapped[folder] == expected
    for folder in folders:
        assert (ROOT / folder / "__init__.py").exists(), folder


def test_lower_layers_never_import_higher_ones():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if path != ROOT / "fusedvlm" / "__init__.py"  # names all of them to type checkers, and imports none
        for name in imported_modules(path)
        if layer_of(name) > layer_of(module_name(path))
    ]
    assert wrong == []


def test_folders_of_one_row_do_not_import_each_other_in_circles():
    edges = {}
    for path in FILES:
        top = module_name(path).split(".")[0]
        for name in imported_modules(path):
            if top in LIBRARY and name.split(".")[0] in LIBRARY:
                edges.setdefault(top, set()).add(name.split(".")[0])
    for one in edges:
        for other in edges[one] - {one}:
            assert one not in edges.get(other, ()), f"{one} and {other} import each other"


def sub_folder(module: str) -> str:
    """The folder a module lies in, one level below the top: `hub_cards.card`, or `hub_cards` for its own files."""
    parts = module.split(".")
    folder = ROOT.joinpath(*parts[:2])
    return ".".join(parts[:2]) if len(parts) > 1 and folder.is_dir() else parts[0]


@pytest.mark.parametrize("top", ["data", "trainers", "scaling", "hub_cards"])
def test_sub_folders_import_each_other_in_one_direction(top):
    edges = {}
    for path in FILES:
        module = module_name(path)
        if module.split(".")[0] != top or path.name in ("__init__.py", "cli.py", "__main__.py"):
            continue
        for name in imported_modules(path):
            one, other = sub_folder(module), sub_folder(name)
            if other.split(".")[0] == top and one != other and "." in one and "." in other:
                edges.setdefault(one, {}).setdefault(other, f"{module} -> {name}")
    for one, others in edges.items():
        for other in others:
            back = edges.get(other, {}).get(one)
            assert back is None, f"{others[other]} and {back}"


def test_no_folder_has_more_than_fifteen_modules():
    """But for the two whose files travel to the Hub, where they stand side by side."""
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py")
    flat = {"modeling_fusedvlm", "processing"}
    assert {folder: count for folder, count in counts.items() if count > 15 and folder not in flat} == {}


def test_no_file_name_means_two_things():
    names = Counter(path.name for path in FILES if path.name not in ("__init__.py", "__main__.py", "cli.py"))
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_the_layout_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("write_layout", ROOT / "docs" / "write_layout.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert (ROOT / "docs" / "layout.md").read_text() == writer.page(), "run: python docs/write_layout.py"
    assert set(LIBRARY) == set(writer.FOLDERS)


def test_nothing_is_imported_twice_under_a_bare_name():
    import fusedvlm.modeling_fusedvlm
    import fusedvlm.processing
    import fusedvlm.trainers  # noqa: F401

    bare = {"modeling_fusedvlm", "processing", "trainers", "hub_cards", "scaling", "data", "evaluation", "serving"}
    assert not bare & set(sys.modules)


def test_public_names_resolve():
    for name in fusedvlm.__all__:
        assert getattr(fusedvlm, name) is not None
    assert set(dir(fusedvlm)) - set(fusedvlm._PACKAGES) == set(fusedvlm.__all__)


def test_facade_and_help_import_nothing_heavy():
    script = "import sys, fusedvlm, fusedvlm.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match="FusedVLMConfig"):
        fusedvlm.Nothing  # noqa: B018


def test_the_oldest_transformers_is_the_same_everywhere():
    """What users may have, what `make test-oldest` runs, what cards and Spaces ask for."""
    requirement = re.search(r'"transformers>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f'"transformers=={requirement}.*"' in (ROOT / "Makefile").read_text()
    assert f"`transformers` {requirement} or newer" in (ROOT / "hub_cards/templates/model_card.md.jinja").read_text()
    assert f'"transformers>={requirement}"' in (ROOT / "hub_cards/release/space.py").read_text()
    assert f'startswith("{requirement}.")' in (ROOT / "tests/tiny.py").read_text()
    assert f"transformers {requirement} or newer" in (ROOT / "modeling_fusedvlm/modeling_fusedvlm.py").read_text()
    assert "make test-oldest" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_version_is_stated_once():
    assert metadata()["project"]["version"] == fusedvlm.__version__
    assert f"## [{fusedvlm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_library_file_is_longer_than_a_sitting():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > 500} == {}

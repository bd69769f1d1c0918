"""The layout tells the truth: every folder is a package, imports have one identity, public names exist."""

import subprocess
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

import fusedvlm

ROOT = Path(__file__).parents[1]
NOT_PACKAGES = {"docs", "benchmarks", "examples", "tests"}


def metadata() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_python_folder_is_listed_as_a_package():
    setuptools = metadata()["tool"]["setuptools"]
    mapped = {folder: name for name, folder in setuptools["package-dir"].items()}
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])
    for folder in ROOT.iterdir():
        if (folder / "__init__.py").exists():
            expected = "fusedvlm" if folder.name == "fusedvlm" else f"fusedvlm.{folder.name}"
            assert mapped.get(folder.name) == expected


def test_nothing_is_imported_twice_under_a_bare_name():
    import fusedvlm.modeling_fusedvlm
    import fusedvlm.processing
    import fusedvlm.trainers  # noqa: F401

    bare = {"modeling_fusedvlm", "processing", "trainers", "hub_cards", "scaling", "data", "evaluation", "serving"}
    assert not bare & set(sys.modules)


def test_public_names_resolve():
    for name in fusedvlm.__all__:
        assert getattr(fusedvlm, name) is not None
    assert set(dir(fusedvlm)) == set(fusedvlm.__all__)


def test_facade_and_help_import_nothing_heavy():
    script = "import sys, fusedvlm, fusedvlm.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match="FusedVLMConfig"):
        fusedvlm.Nothing  # noqa: B018


def test_version_is_stated_once():
    assert metadata()["project"]["version"] == fusedvlm.__version__
    assert f"## [{fusedvlm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_library_file_is_longer_than_a_sitting():
    long = [
        f"{path.relative_to(ROOT)}: {count}"
        for folder in ROOT.iterdir()
        if (folder / "__init__.py").exists() and folder.name != "tests"
        for path in folder.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    ]
    assert long == []


def test_readme_file_tree_names_every_library_file():
    tree = (ROOT / "README.md").read_text()
    for folder in ROOT.iterdir():
        if (folder / "__init__.py").exists() and folder.name != "tests":
            for path in folder.rglob("*.py"):
                if path.name != "__init__.py":
                    assert path.name in tree, f"{path.relative_to(ROOT)} is not in the README's file tree"

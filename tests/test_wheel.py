"""What `pip install` puts on a user's machine: the library and its data files, no tests, no warnings, and it works."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_LIBRARY = {".ci", ".github", "benchmarks", "docs", "tests"}


def tracked() -> list[str]:
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip("needs a git checkout: an exported tree cannot say which files are its own")
    return [name for name in found.stdout.splitlines() if (ROOT / name).exists()]


def copy_sources(folder: Path) -> Path:
    """The tracked files in a folder of their own: leftovers of earlier builds must not help."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, and what the build printed."""
    sources, folder = copy_sources(tmp_path_factory.mktemp("sources")), tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl")), done.stdout + done.stderr


@pytest.mark.xdist_group("wheel")
def test_the_build_warns_of_nothing(built):
    lines = [line for line in built[1].splitlines() if "byte-compiling" not in line]
    assert [line for line in lines if "warn" in line.lower() or "deprecat" in line.lower() or "absent" in line] == []


@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_the_library_and_nothing_else(built):
    inside = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked():
        top = name.split("/")[0]
        if "/" in name and top not in NOT_LIBRARY:
            expected.add(name if top == "fusedvlm" else f"fusedvlm/{name}")
    assert inside == expected


def install(folder: Path, *what: str) -> Path:
    """The Python of a new environment into which the package was installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # The dependencies come from the running environment through a path file; only fusedvlm itself is new. Path files
    # inside those folders are not followed, so the editable install of this checkout stays out.
    theirs = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys([*theirs, sysconfig.get_path("purelib")])))
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-deps", "--ignore-installed", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", *options, *what], check=True)
    return python


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """The Python of an environment into which the wheel was installed."""
    return install(tmp_path_factory.mktemp("environment"), str(built[0]))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """(folder, Python) of a contributor's checkout after `pip install -e .`."""
    folder = copy_sources(tmp_path_factory.mktemp("checkout"))
    command = ["--no-build-isolation", "--editable", str(folder)]
    return folder, install(tmp_path_factory.mktemp("editable"), *command)


@pytest.mark.xdist_group("wheel")
def test_an_installed_wheel_works_without_the_checkout(python, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-I", ROOT / "tests" / "wheel_smoke.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout  # and not the checkout


USER = """
import fusedvlm
from fusedvlm import FusedVLMConfig, GenerationTrainer
from fusedvlm.scaling import fit_power_law
from fusedvlm.trainers import GenerationTrainr

reveal_type(GenerationTrainer)
reveal_type(FusedVLMConfig())
reveal_type(fit_power_law([1, 2, 3], [1.0, 2.0, 3.0]))
reveal_type(fusedvlm.FusedVLMModel.from_pretrained("folder").to("cpu"))

fusedvlm.Nonsense
"""
# What torch and transformers say of themselves is not the question here, and reading them takes most of a minute.
MYPY = """[mypy]
[mypy-torch.*,torchvision.*,transformers.*,numpy.*,scipy.*,matplotlib.*,PIL.*,peft.*,trl.*,datasets.*,accelerate.*]
follow_imports = skip
[mypy-huggingface_hub.*,open_clip.*,safetensors.*,jinja2.*,typer.*,yaml.*,tqdm.*,pydantic.*]
follow_imports = skip
"""


def check_user_code(checker: str, python: Path, folder: Path, mypy_path: str = "") -> None:
    """Let a checker read USER in a folder: it must know the types, and refuse the two names that are wrong."""
    (folder / "user.py").write_text(USER.lstrip())
    (folder / "mypy.ini").write_text(MYPY.replace("[mypy]", f"[mypy]\nmypy_path = {mypy_path}", 1))
    options = {
        "mypy": ["--python-executable", str(python), "--config-file", "mypy.ini", "--no-error-summary"],
        "basedpyright": ["--pythonpath", str(python)],
    }
    command = [sys.executable, "-m", checker, *options[checker], "user.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(errors) == 2, done.stdout
    assert [line for line in errors if ":4:" in line and "GenerationTrainr" in line]
    assert [line for line in errors if ":11:" in line and "Nonsense" in line]
    revealed = {
        line.partition(":")[2].split(":")[0]: line.split("is ")[-1]
        for line in lines
        if "note:" in line or "information:" in line
    }
    wanted = {"6": "GenerationTrainer", "7": "FusedVLMConfig", "8": "PowerLawFit", "9": "FusedVLMModel"}
    assert {line: name in revealed[line] for line, name in wanted.items()} == dict.fromkeys(wanted, True), revealed
    assert "Any" not in revealed["9"]


@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_type_checkers_know_the_public_names_of_an_installed_wheel(checker, python, tmp_path):
    check_user_code(checker, python, tmp_path)


@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_type_checkers_know_the_public_names_beside_an_editable_install(checker, checkout, tmp_path):
    check_user_code(checker, checkout[1], tmp_path)


@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_type_checkers_know_the_public_names_inside_a_checkout(checker, checkout):
    folder, python = checkout
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["mypy"]
    check_user_code(checker, python, folder, settings["mypy_path"])


@pytest.mark.xdist_group("wheel")
def test_an_editable_install_imports_from_the_checkout_and_never_through_the_links(checkout, tmp_path):
    folder, python = checkout
    code = "import fusedvlm, fusedvlm.trainers, fusedvlm.data.records as r; print(fusedvlm.__file__, fusedvlm.trainers.__file__, r.__file__)"
    for where in (folder, tmp_path):
        done = subprocess.run([python, "-c", code], cwd=where, capture_output=True, text=True, check=True)
        wanted = [folder / name for name in ("fusedvlm/__init__.py", "trainers/__init__.py", "data/records.py")]
        assert done.stdout.split() == [str(path) for path in wanted]


@pytest.mark.xdist_group("wheel")
def test_another_copy_on_pythonpath_goes_before_an_editable_install(checkout, tmp_path):
    (tmp_path / "copy" / "fusedvlm").mkdir(parents=True)
    (tmp_path / "copy" / "fusedvlm" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "copy")}
    command = [checkout[1], "-c", "import fusedvlm; print(fusedvlm.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "copy" / "fusedvlm" / "__init__.py")

"""What `pip install` puts on somebody's machine: the library and its data files, no tests, no warnings, and it works."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel from a copy of the sources (leftovers of earlier builds must not help), and what the build printed."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, sources / name)
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


@pytest.mark.xdist_group("wheel")
def test_an_installed_wheel_works_without_the_checkout(built, tmp_path):
    # The dependencies come from the running environment through a path file; only fusedvlm itself is new.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # Path files inside these folders are not followed, so the editable install of this checkout stays out.
    theirs = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys([*theirs, sysconfig.get_path("purelib")])))
    install = ["pip", "--python", str(python), "install", "--quiet", "--no-deps", "--ignore-installed", "--no-index"]
    subprocess.run([sys.executable, "-m", *install, str(built[0])], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-I", ROOT / "tests" / "wheel_smoke.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout  # and not the checkout

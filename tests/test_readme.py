"""Every code block of the README runs, in order, in a folder where the quickstart's results lie."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedvlm.tests import fork_server
from fusedvlm.tests.pages import Page, blocks_of, names_of

ROOT = Path(__file__).parents[1]
BLOCKS = blocks_of(ROOT / "README.md", "python|bash")


@pytest.fixture(scope="module")
def place(quickstart_family, tmp_path_factory):
    """A folder with what `make quickstart` leaves behind, made by the same code at its smallest."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(quickstart_family.folder, folder / "runs" / "quickstart")
    largest = folder / "runs" / "quickstart" / quickstart_family.variant_folder().name
    # The smallest run dials to m = 4; the README shows the real one's name and an m of 8.
    shutil.copytree(largest, largest.with_name("fusedvlm-m32"))
    return folder


@pytest.fixture(scope="module")
def page(place):
    """The README's blocks in that folder; those in Python share their names."""
    namespace: dict = {"__name__": "readme"}

    def run_block(kind: str, code: str) -> None:
        if kind == "python":
            code = code.replace("num_visual_tokens=[1, 8])", "num_visual_tokens=[1, 4])")
            exec(compile(code, "README.md", "exec"), namespace)
            return
        for line in code.strip().splitlines():
            run_line(line)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
        page = Page(BLOCKS, run_block)
        page.namespace = namespace
        yield page


def test_there_are_blocks_of_both_kinds():
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("python") >= 6
    assert kinds.count("bash") >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=names_of(BLOCKS))
def test_block(page, number):
    page.run(number)


def test_what_the_blocks_leave_behind(page, place):
    page.finish()
    assert isinstance(page.namespace["answer"], str)
    assert len(page.namespace["texts"]) == 2
    assert (place / "runs/mine/variant/model.safetensors").exists()


def run_line(line: str) -> None:
    """Run one shell line. The two make targets would train for minutes and start this very suite, so make plans them
    only; the quickstart they start is run above, the suite is running."""
    words = shlex.split(line)
    if words[0] == "make":
        plan = subprocess.run(["make", "--dry-run", *words[1:]], capture_output=True, text=True, check=True, cwd=ROOT)
        assert {"quickstart": "fusedvlm quickstart", "test": "pytest"}[words[1]] in plan.stdout
        return
    words[0] = fork_server.executable(words[0])
    result = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert result.returncode == 0, f"{line}\n{result.stderr}"
    assert result.stdout.strip()

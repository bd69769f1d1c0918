"""Every code block of the README runs, in order, in a folder where the quickstart's results lie."""

from fusedvlm.tests import fork_server
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what `make quickstart` leaves behind, made by the same code at its smallest."""
    from fusedvlm.quickstart.run import run
    from fusedvlm.tests.quickstart.test_quickstart import TINY

    folder = tmp_path_factory.mktemp("readme")
    family = run(TINY, folder / "runs" / "quickstart", "fusedvlm quickstart")
    largest = family.variant_folder()
    # The smallest run dials to m = 4; the README shows the real one's name and an m of 8.
    shutil.copytree(largest, largest.with_name("fusedvlm-m32"))
    return folder


def test_there_are_blocks_of_both_kinds():
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("python") >= 6
    assert kinds.count("bash") >= 2


def test_all_blocks_in_order(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    namespace: dict = {"__name__": "readme"}
    for kind, code in BLOCKS:
        if kind == "python":
            code = code.replace("num_visual_tokens=[1, 8])", "num_visual_tokens=[1, 4])")
            exec(compile(code, "README.md", "exec"), namespace)
            continue
        for line in code.strip().splitlines():
            run_line(line)
    assert isinstance(namespace["answer"], str)
    assert len(namespace["texts"]) == 2
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

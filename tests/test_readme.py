"""Every code block of the README runs, in order, as in a stranger's shell: nothing is on the PATH before the README puts
it there, and what a block prints is what the README shows under it. The trained toy answers, so the answers are real."""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedvlm.costs.counts import count_flops, read_shapes
from fusedvlm.costs.profiled_model import paper_config
from fusedvlm.files import read_json
from fusedvlm.quickstart.toy import TRAINED
from fusedvlm.tests import fork_server
from fusedvlm.tests.pages import Page, blocks_of, names_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = blocks_of(ROOT / "README.md", "python|bash|text|console|")
BLOCKS = [block for block in SHOWN if block[0] in ("python", "bash")]
# Under a block stands what it prints.
PRINTED = {block: after[1] for block, after in itertools.pairwise(SHOWN) if after[0] == "text"}
FACTS = read_json(ROOT / "docs" / "pictures" / "dial.json")


class Shell:
    """A new terminal of somebody who follows the README: our commands are found once the environment is activated."""

    def __init__(self) -> None:
        self.is_activated = self.is_installed = False

    def run(self, block: str) -> str:
        """What the lines of a block print together."""
        lines = [part.strip() for line in block.strip().splitlines() for part in line.split("&&")]
        return "".join(map(self.run_line, lines))

    def run_line(self, line: str) -> str:
        """One line's standard output. What takes minutes or a network is planned or believed, nothing else."""
        if line == "source .venv/bin/activate":
            self.is_activated = True
            return ""
        if line in ("python3 -m venv .venv", "pip install --editable ."):
            self.is_installed = self.is_installed or line.startswith("pip")
            return ""
        words = shlex.split(line)
        if words[0] == "make":
            plan = subprocess.run(
                ["make", "--dry-run", *words[1:]], capture_output=True, text=True, check=True, cwd=ROOT
            )
            assert "fusedvlm quickstart" in plan.stdout
            return ""
        assert words[0] == "fusedvlm"
        assert self.is_activated, f"{line}: command not found"
        assert self.is_installed, f"{line}: command not found"
        words[0] = fork_server.executable(words[0])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        assert result.stdout.strip()
        return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def page(place):
    """The README's blocks in that folder; those in Python share their names, those of the shell a terminal."""
    namespace: dict = {"__name__": "readme"}
    shell = Shell()

    def run_block(kind: str, code: str) -> None:
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(code, "README.md", "exec"), namespace)
            printed = output.getvalue()
        else:
            printed = shell.run(code)
        if (kind, code) in PRINTED:
            assert printed.rstrip("\n") == PRINTED[kind, code].rstrip("\n")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
        yield Page(BLOCKS, run_block)


def test_there_are_blocks_of_both_kinds_and_output():
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("python") >= 6
    assert kinds.count("bash") >= 4
    assert len(PRINTED) >= 5
    assert sum(kind == "text" for kind, _ in SHOWN) == len(PRINTED), "every text block stands under what prints it"


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=names_of(BLOCKS))
def test_block(page, number):
    page.run(number)


def test_what_the_blocks_leave_behind(page, place):
    page.finish()
    assert (place / "runs/mine/variant/model.safetensors").exists()
    assert (place / "toy/scaling.html").exists()


def rows_of(first_cell: str) -> list[list[str]]:
    """Cells of the README's table rows that begin with this."""
    rows = re.findall(rf"^\| ({first_cell}) \|(.*)\|$", README, re.MULTILINE)
    return [[head, *(cell.strip() for cell in rest.split("|"))] for head, rest in rows]


def test_the_table_of_costs_is_what_was_measured_and_counted():
    """`docs/write_picture.py` prints it; here every cell is told apart from its source again."""
    curves, shapes = FACTS["curves"]["question"], read_shapes(paper_config())
    rows = {row[0]: row[1:] for row in rows_of(r"\d+")}
    assert list(map(int, rows)) == [1, 2, 4, 8, 16, 32, 256, 768]
    for name, (one_word, dense, first, prefill, total) in rows.items():
        flops = count_flops(shapes, int(name))
        assert f"{flops.prefill / 1e12:.2f}" == prefill
        assert f"{flops.first_token / 1e12:.2f}" == total
        if name in curves["one_word"]:
            assert f"{curves['one_word'][name]:.3f}".removeprefix("0") == one_word
            assert f"{curves['dense'][name]:.3f}".removeprefix("0") == dense
            assert f"{1000 * FACTS['seconds_to_first_token'][name]:.0f} ms" == first
    (beside,) = rows_of("LLaVA-1.5: 576")
    dense_llava = FACTS["flops"]["LLaVA-1.5"]
    assert beside[4:] == [f"{dense_llava[part] / 1e12:.2f}" for part in ("prefill", "first_token")]


def test_the_rows_with_and_without_the_question_are_the_recorded_ones():
    titles = [
        ("one-word questions, fusion reads them", "question", "one_word"),
        ("the same, without the question", "twin", "one_word"),
        ("the same, without it, by the unconditioned recipe", "unconditioned", "one_word"),
        ("list and read, fusion reads the question", "question", "dense"),
        ("the same, without it", "twin", "dense"),
    ]
    for title, entrant, key in titles:
        scores = FACTS["curves"][entrant][key].values()
        assert rows_of(re.escape(title))[0][1:] == [f"{score:.3f}".removeprefix("0") for score in scores]
    last = FACTS["curves"]["unconditioned"]["dense"].values()
    row = rows_of(re.escape("the same, without it, by the unconditioned recipe"))[1]
    assert row[1:] == [f"{score:.3f}".removeprefix("0") for score in last]


def test_the_toy_is_the_recorded_run():
    scores = {
        (row["task"], row["num_visual_tokens"]): row["score"] for row in read_json(TRAINED / "results.json")["scores"]
    }
    for m, mean in FACTS["curves"]["question"]["dense"].items():
        assert (scores["list", int(m)] + scores["read", int(m)]) / 2 == pytest.approx(mean)
    assert read_json(TRAINED / "results.json")["environment"] == FACTS["measured"]


def test_the_toy_is_written_whole_and_nothing_is_overwritten(tmp_path):
    def write(folder: Path) -> subprocess.CompletedProcess:
        command = [fork_server.executable("fusedvlm"), "toy", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert write(tmp_path / "toy").returncode == 0
    assert write(tmp_path / "toy").returncode == 0  # there already, unchanged
    weights = tmp_path / "toy" / "fusedvlm-m32" / "model.safetensors"
    weights.write_bytes(b"mine")
    refused = write(tmp_path / "toy")
    assert refused.returncode == 2
    assert "something else is there already" in refused.stderr
    assert weights.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    shutil.rmtree(tmp_path / "toy")
    (tmp_path / "toy").mkdir()
    assert write(tmp_path / "toy").returncode == 0  # an empty folder is as good as none

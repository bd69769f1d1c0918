"""The guides docs/which_m.md and docs/llava_data.md: every command runs, every number is counted or fitted again."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.costs.counts import count_flops, read_shapes
from fusedvlm.costs.profiled_model import paper_config
from fusedvlm.files import write_json
from fusedvlm.quickstart.toy import write_toy
from fusedvlm.scaling.tradeoff.planner import Cost, make_plan, parse_budget, read_curves
from fusedvlm.tests import tiny
from fusedvlm.tests.pages import Page, blocks_of, names_of

DOCS = Path(__file__).parents[1] / "docs"
WHICH_M = blocks_of(DOCS / "which_m.md", "bash")
LLAVA_DATA = blocks_of(DOCS / "llava_data.md", "bash")
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF\n", re.DOTALL | re.MULTILINE)


def run_block(kind: str, block: str) -> None:
    for name, text in HEREDOC.findall(block):
        Path(name).write_text(text)
    for line in HEREDOC.sub("", block).splitlines():
        program, *words = shlex.split(line)
        assert program == "fusedvlm"
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert result.output.strip(), line


def page_in(folder: Path, blocks: list[tuple[str, str]]):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        yield Page(blocks, run_block)


@pytest.fixture(scope="module")
def which_m(tmp_path_factory):
    folder = tmp_path_factory.mktemp("which_m")
    write_toy(folder / "toy")
    yield from page_in(folder, WHICH_M)


@pytest.fixture(scope="module")
def llava_data(tmp_path_factory):
    """What the page says its reader has: a JSON file in LLaVA's format and a folder of pictures."""
    folder = tmp_path_factory.mktemp("llava")
    (folder / "pictures").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A red ring."}]
    for name in "abcd":
        tiny.picture(ord(name)).save(folder / "pictures" / f"{name}.png")
    write_json(folder / "mine.json", [{"id": n, "image": f"{n}.png", "conversations": turns} for n in "abcd"])
    yield from page_in(folder, LLAVA_DATA)


@pytest.mark.parametrize("number", range(len(WHICH_M)), ids=names_of(WHICH_M))
def test_a_command_of_which_m(which_m, number):
    which_m.run(number)


@pytest.mark.parametrize("number", range(len(LLAVA_DATA)), ids=names_of(LLAVA_DATA))
def test_a_command_of_llava_data(llava_data, number):
    llava_data.run(number)


def test_the_predicted_losses_are_those_of_the_planner():
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) \| (\d+) % \| (\d+) % \| (\d+) % \|$", (DOCS / "which_m.md").read_text(), re.M
    )
    assert [row[0] for row in rows] == ["16", "32", "64", "128", "256", "512"]
    shapes = read_shapes(paper_config())
    counts = [int(row[0]) for row in rows]
    for m, prefill, *_ in rows:
        assert f"{count_flops(shapes, int(m)).prefill / 1e12:.2f}" == prefill
    costs = [Cost(m, m) for m in [*counts, 768]]
    for column, task in enumerate(("ocr", "reasoning", "caption"), start=2):
        curves = read_curves("paper", task, groups=["fusion_inputs=vision+question+queries"])
        for row in rows:
            plan = make_plan(curves, costs, parse_budget(f"{row[0]} TFLOPs"), resamples=1)
            assert f"{100 * plan.best.loss:.0f}" == row[column]


def test_the_counted_prices_are_the_counters():
    shapes, text = read_shapes(paper_config()), (DOCS / "which_m.md").read_text()
    assert (
        f"falls from {count_flops(shapes, 256).first_token / 1e12:.1f} to {count_flops(shapes, 1).first_token / 1e12:.1f} TFLOP"
        in text
    )
    one_view = count_flops(shapes, 1, num_views=1).first_token / 1e12
    assert f"an image of one view costs {one_view:.2f} TFLOP in all" in text

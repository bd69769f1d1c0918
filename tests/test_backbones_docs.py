"""The commands and the code of docs/backbones.md, with tiny backbones in place of those on the Hub."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fusedvlm
from fusedvlm.cli import app
from fusedvlm.tests import tiny
from fusedvlm.tests.pages import Page, blocks_of, names_of

PAGE = Path(fusedvlm.__file__).parent.parent / "docs" / "backbones.md"
if not PAGE.exists():
    pytest.skip("docs are not part of an installed package", allow_module_level=True)
BLOCKS = blocks_of(PAGE, "bash|python")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("backbones")
    vision, text = tiny.save_backbones(place / "towers")
    tiny.picture(1).save(place / "scene.png")
    row = {
        "images": ["scene.png"],
        "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}],
    }
    (place / "chat.jsonl").write_text("\n".join(json.dumps(row) for _ in range(4)))
    local = {"HuggingFaceTB/SmolLM2-360M-Instruct": text, "openai/clip-vit-large-patch14-336": vision}

    def run(kind: str, block: str) -> None:
        for name, folder in local.items():
            assert name in block or kind == "bash"
            block = block.replace(name, folder)
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), {})
            return
        for line in block.splitlines():
            words = shlex.split(line)
            small = ["--preset", "cpu_smoke", "--max_steps", "1"] if words[1] == "train" else []
            result = CliRunner().invoke(app, [*words[1:], *small], catch_exceptions=False)
            assert result.exit_code == 0, result.output

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        yield Page(BLOCKS, run)


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=names_of(BLOCKS))
def test_block(page, number):
    page.run(number)

"""Every command and code block of docs/comparison.md works as written, in the order of the page."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from typer.testing import CliRunner

import fusedvlm
from fusedvlm.cli import app
from fusedvlm.evaluation import EvaluationResults, TaskScore, describe_environment
from fusedvlm.tests.tiny import picture, text_tokenizer

PAGE = Path(fusedvlm.__file__).parent.parent / "docs" / "comparison.md"
if not PAGE.exists():
    pytest.skip("docs are not part of an installed package", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (fusedvlm compare.*)$", TEXT, re.MULTILINE)
REDUCERS = TEXT[TEXT.index("## Reducers") : TEXT.index("## Compare")]
BLOCKS = re.findall(r"```python\n(.*?)```", REDUCERS, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, glance):
    """Everything the page takes for granted, in one folder."""
    folder = tmp_path_factory.mktemp("connectors")
    tokenizer = text_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    ).save_pretrained(folder / "LLAVA")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "LLAVA")
    picture(0).save(folder / "a.png")
    for name in ("one", "two"):
        results = EvaluationResults(describe_environment("test"))
        results.scores = [TaskScore("list", m, 0.5, 10, 0.1) for m in (1, 4)]
        (folder / "runs" / name).mkdir(parents=True)
        results.save(folder / "runs" / name / "results.json")
    shared, _ = glance
    shutil.copytree(shared.folder, folder / "runs" / "compare" / "world")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(place, command, monkeypatch):
    monkeypatch.chdir(place)
    arguments = shlex.split(command)[1:]
    # At the size of a glance, with one set of m for all: the page is about what works, its record about the numbers.
    arguments = [part for n, part in enumerate(arguments) if "--tokens" not in (part, *arguments[max(0, n - 1) : n])]
    result = CliRunner().invoke(app, [*arguments, "--preset", "glance"])
    assert result.exit_code == 0, (result.exception, result.stderr[-2000:])
    assert result.stdout.strip()
    if "--all" in command:
        page = (place / "runs" / "compare" / "comparison.html").read_text()
        assert "quecc" in page
        assert "dense+vispruner" in (place / "runs" / "compare.md").read_text()
    if "runs/one" in command:
        assert (place / "runs" / "given" / "given.html").exists()


def test_code_about_reducers(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert len(BLOCKS) == 2
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.startswith("16 1 16\n")

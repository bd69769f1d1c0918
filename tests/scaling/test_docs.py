"""Every command and code block of docs/scaling.md works as written."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fusedvlm
from fusedvlm.cli import app
from fusedvlm.tests.pages import Page, blocks_of, names_of
from fusedvlm.tests.tiny import build_model, build_tiny_processor, text_tokenizer

PAGE = Path(fusedvlm.__file__).parent.parent / "docs" / "scaling.md"
if not PAGE.exists():
    pytest.skip("docs are not part of an installed package", allow_module_level=True)
# Those that train have their test in tests/lab.
COMMANDS = re.findall(r"^    (fusedvlm (?!scaling lab).*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
BLOCKS = blocks_of(PAGE, "python")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Everything the page takes for granted, in one folder."""
    folder = tmp_path_factory.mktemp("docs")
    rows = "".join(f"mine,acc,{m},{20 * m**0.2}\n" for m in (1, 8, 64, 256))
    (folder / "results.csv").write_text("benchmark,metric,m,score\n" + rows)
    (folder / "FOLDER").mkdir()
    (folder / "FOLDER" / "scores.csv").write_text("benchmark,metric,m,score\n" + rows)
    costs = [{"num_visual_tokens": m, "tflops": m / 50, "latency_ms": 80 + m / 4} for m in (1, 64, 256)]
    (folder / "costs.json").write_text(json.dumps(costs))
    tokenizer = text_tokenizer()
    tokenizer.save_pretrained(folder / "MODEL")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "MODEL")
    pairs = [{"question": "how many?", "chosen": f"yes, {i} objects", "rejected": "no, maybe a dog"} for i in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    model = build_model(folder)
    model.save_pretrained(folder / "VARIANT")
    build_tiny_processor(model).save_pretrained(folder / "VARIANT")
    asked = [{"question": f"which colour, {n}?", "scores": {"1": 0.5, "4": 0.5}} for n in range(20)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for name in "ab":
        noise = np.random.default_rng(ord(name)).integers(0, 255, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    (folder / "images.jsonl").write_text(json.dumps({"image_a": "a.png", "image_b": "b.png"}) + "\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(place, command, monkeypatch):
    monkeypatch.chdir(place)
    # Fewer resamples than by default: the page is about what works, other tests about the numbers.
    quick = ["--resamples", "20"] if re.search(r"scaling (fit|report)|plan", command) else []
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], *quick])
    assert result.exit_code == 0, (result.exception, result.stderr[-2000:])
    assert result.stdout.strip()
    if "report paper" in command:
        page = (place / "scaling.html").read_text()
        assert page.count("Shapes of curves: paper") == 2 * 3  # three kinds of input; heading and image text
        assert "What the question adds: paper" in page


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Blocks of Python, each with names of its own, in one folder."""
    assert BLOCKS
    folder = tmp_path_factory.mktemp("code")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        page = Page(BLOCKS, lambda kind, block: exec(compile(block, str(PAGE), "exec"), {}))
        page.folder = folder
        yield page


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=names_of(BLOCKS))
def test_code_of_the_page(code, number):
    code.run(number)


def test_the_code_of_the_page_draws(code):
    code.finish()
    assert (code.folder / "pope.png").exists()

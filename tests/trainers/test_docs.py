"""Every command of docs/training.md, in its order, at the smallest size."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fusedvlm
from fusedvlm.cli import app
from fusedvlm.tests.pages import Page, blocks_of, names_of
from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers.checkpoints import problems
from fusedvlm.trainers.recipes import FOLDER
from fusedvlm.trainers.recipes.command_words import read_recipe
from fusedvlm.trainers.recipes.recipe_files import set_field
from fusedvlm.trainers.recipes.recipe_parsing import plan_run

PAGE = Path(fusedvlm.__file__).parent.parent / "docs" / "training.md"
if not PAGE.exists():
    pytest.skip("docs are not part of an installed package", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = blocks_of(PAGE, "bash|python|console")
RUN = [block for block in BLOCKS if block[0] != "console"]
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF\n", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What docs/data.md leaves behind: a data section and its manifest."""
    folder = tmp_path_factory.mktemp("docs")
    data = smoke.write_data(folder / "data", count=4)
    data.rename(folder / "data" / "smoke.jsonl")  # where the smoke preset looks
    (folder / "data.yaml").write_text("sources:\n  - {type: chat, path: data/smoke.jsonl}\nseed: 3\n")
    (folder / "manifest.json").write_text('{"format": 1, "sources": [], "samples": 4}')
    return folder


def run_command(line: str) -> None:
    """One line of a bash block; training is made small, launchers are left out (they have tests of their own)."""
    words = shlex.split(line, comments=True)
    if words[0].startswith("ACCELERATE="):
        return
    if words[0] == "accelerate":
        assert (FOLDER / "accelerate" / Path(words[3]).name).is_file()
        words = ["fusedvlm", "train", *words[words.index("fusedvlm.trainers") + 1 :]]
    assert words[0] == "fusedvlm", line
    is_run = words[1] == "train" and words[2] != "recipes" and "--print-config" not in words
    small = ["--preset", "cpu_smoke"] if is_run else []
    result = CliRunner().invoke(app, [*words[1:], *small], catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.output}"


def run_block(kind: str, block: str) -> None:
    if kind == "python":
        exec(compile(block, "docs/training.md", "exec"), {})
        return
    for name, text in HEREDOC.findall(block):
        Path(name).write_text(text)
    for line in HEREDOC.sub("", block).splitlines():
        run_command(line)


@pytest.fixture(scope="module")
def page(place):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        yield Page(RUN, run_block)


@pytest.mark.parametrize("number", range(len(RUN)), ids=names_of(RUN))
def test_block(page, number):
    page.run(number)


def test_what_the_blocks_leave_behind(page, place):
    page.finish()
    for folder in ("contrastive/final", "generation/final", "variants/fusedvlm-m8", "variants/fusedvlm-m1",
                   "elastic/final", "mine/final", "python/final", "two/final"):  # fmt: skip
        assert problems(place / "runs" / folder) == [], folder


def test_blocks_that_need_a_cluster_are_understood(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for kind, block in BLOCKS if kind == "console" for line in block.splitlines()]
    trained = [shlex.split(line) for line in lines if "fusedvlm.trainers" in line]
    assert len(trained) == 3
    for words in trained:
        if "--config_file" in words:
            assert (FOLDER / "accelerate" / Path(words[words.index("--config_file") + 1]).name).is_file()
        stage, *rest = words[words.index("fusedvlm.trainers") + 1 :]
        recipe, _ = read_recipe(stage, rest)
        set_field(recipe, "training.use_cpu", True)
        assert plan_run(recipe).run.global_batch_size in (256, 2560)


def test_the_page_names_everything_that_is_shipped():
    for path in [*FOLDER.glob("accelerate/*.yaml"), *FOLDER.glob("presets/*.yaml")]:
        assert path.name in TEXT or f"`{path.stem}`" in TEXT, path.name


@pytest.mark.parametrize("path", sorted((FOLDER / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_shipped_configuration(path):
    """With its own loader, which refuses unknown keys, and nothing left to be asked."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "cpu_gloo": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]
    assert config.num_processes == (2 if path.stem == "cpu_gloo" else 8)
    assert config.use_cpu == (path.stem == "cpu_gloo")
    if path.stem == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin

        options = {key.removeprefix("fsdp_"): value for key, value in config.fsdp_config.items()}
        options["transformer_cls_names_to_wrap"] = options.pop("transformer_layer_cls_to_wrap").split(",")
        options["fsdp_version"] = options.pop("version")
        options["cpu_offload"] = options.pop("offload_params")
        plugin = FullyShardedDataParallelPlugin(**options)
        assert plugin.fsdp_version == 2
        assert "SHARDED" in str(plugin.state_dict_type)
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert config.deepspeed_config["gradient_accumulation_steps"] == "auto"

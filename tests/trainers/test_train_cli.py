"""`fusedvlm train`: three stages one after the other, offline, at the smallest size; what they leave behind."""

import json
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.tests import fork_server, tiny
from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers import run_recipe
from fusedvlm.trainers.checkpoints import problems
from fusedvlm.trainers.cli import HELP, main
from fusedvlm.trainers.recipes.recipe_files import STAGES, load_recipe, set_field
from fusedvlm.trainers.recipes.recipe_help import stage_help


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which all three stages ran by command, with seconds and output of each."""
    folder = tmp_path_factory.mktemp("world")
    smoke.write_data(folder / "data", count=6)
    (folder / "data" / "data.jsonl").rename(folder / "data" / "smoke.jsonl")
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("contrastive", "generation", "variants"):
            begin = time.monotonic()
            result = CliRunner().invoke(app, ["train", stage, "--preset", "cpu_smoke"], catch_exceptions=False)
            runs[stage] = (result, time.monotonic() - begin)
    return folder, runs


def test_the_smoke_preset_runs_every_stage_offline_within_a_minute(world):
    _, runs = world
    assert [result.exit_code for result, _ in runs.values()] == [0, 0, 0]
    assert sum(seconds for _, seconds in runs.values()) < 60


def test_standard_output_is_the_folders_that_were_made(world):
    _, runs = world
    assert runs["contrastive"][0].stdout.split() == ["runs/contrastive/final"]
    assert runs["variants"][0].stdout.split() == [f"runs/variants/fusedvlm-m{m}" for m in (8, 4, 1)]
    assert "stage 2 (generation): parameters that learn" in runs["generation"][0].stderr


@pytest.mark.parametrize(("m", "followup"), [(8, 2), (4, 2), (1, 1)])
def test_variants_load_with_transformers_alone_and_answer(world, m, followup):
    folder = world[0] / "runs" / "variants" / f"fusedvlm-m{m}"
    assert problems(folder) == []
    assert not list(folder.glob("*.bin"))
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = model.config
    assert (config.num_visual_tokens, config.num_followup_visual_tokens) == (m, followup)
    assert config.trained_num_visual_tokens == [m]
    assert (processor.num_visual_tokens, processor.max_num_visual_tokens) == (m, m)
    inputs = processor(text="<image>what?", images=[tiny.picture(0)], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == m
    assert torch.isfinite(model(**inputs).logits).all()


def test_stage_1_went_into_stage_2(world):
    """The vision tower of stage 2 is stage 1's, two small steps later, and no random one."""
    first, second = (smoke.weights(world[0] / "runs" / s / "final") for s in ("contrastive", "generation"))
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert 0 < (first[name] - second[name]).abs().max() < 0.01


def test_the_record_of_a_run(world):
    record = json.loads((world[0] / "runs" / "generation" / "run.json").read_text())
    assert (record["format"], record["stage"], record["processes"]) == (1, "generation", 1)
    assert record["recipe"]["training"]["learning_rate"] == 1e-3
    assert {"python", "torch", "transformers", "fusedvlm"} <= set(record["versions"])
    assert record["data"]["samples"] == 6
    source = record["data"]["sources"][0]
    assert source["bytes"] == (world[0] / "data" / "smoke.jsonl").stat().st_size
    assert record["started"] <= record["finished"]
    ladder = json.loads((world[0] / "runs" / "variants" / "run.json").read_text())
    assert ladder["variants"] == ["fusedvlm-m8", "fusedvlm-m4", "fusedvlm-m1"]
    own = json.loads((world[0] / "runs" / "variants" / "fusedvlm-m4" / "run.json").read_text())
    assert own["recipe"]["model"]["num_visual_tokens"] == 4


def test_a_finished_stage_is_left_alone_and_a_different_one_is_refused(world, monkeypatch):
    folder, _ = world
    monkeypatch.chdir(folder)
    before = (folder / "runs" / "generation" / "final" / "model.safetensors").stat().st_mtime_ns
    words = ["train", "generation", "--preset", "cpu_smoke", "--logging_steps", "2", "--learning_rate", "1e-3"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "is finished; nothing to do" in result.stderr) == (0, True)
    assert (folder / "runs" / "generation" / "final" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"other settings \(training.learning_rate: 0.001 -> 0.0005\)"):
        CliRunner().invoke(app, [*words, "--learning_rate", "5e-4"], catch_exceptions=False)


def test_never_refuses_a_folder_with_checkpoints(world):
    folder, _ = world
    recipe = smoke.smoke_recipe("contrastive", folder / "runs" / "contrastive", folder / "data" / "smoke.jsonl")
    recipe.sections["run"]["resume"] = "never"
    (folder / "runs" / "contrastive" / "final").rename(folder / "aside")
    try:
        with pytest.raises(ValueError, match="holds checkpoint-2 of an earlier run"):
            run_recipe(recipe)
    finally:
        (folder / "aside").rename(folder / "runs" / "contrastive" / "final")


def test_variants_need_stage_2(tmp_path):
    recipe = smoke.smoke_recipe("variants", tmp_path, smoke.write_data(tmp_path / "data", count=2))
    set_field(recipe, "model.model_name_or_path", None)
    with pytest.raises(ValueError, match="Stage 3 starts from stage-2 weights"):
        run_recipe(recipe)
    set_field(recipe, "model.model_name_or_path", "runs/generation/final")
    with pytest.raises(ValueError, match="does not exist: run the stage that writes it first"):
        run_recipe(recipe)


def test_new_query_rows_extend_the_dial_and_leave_the_old_ones(model, processor):
    from fusedvlm.trainers.runs.build_model import set_visual_tokens

    larger = type(model)(model.config.__class__.from_dict(model.config.to_dict()))
    larger.load_state_dict(model.state_dict())
    own = tiny.build_tiny_processor(larger)
    inputs = own(text="<image>what?", images=[tiny.picture(0)], num_visual_tokens=5, return_tensors="pt")
    before = larger(**inputs).logits
    rows = larger.model.fuser.embed_tokens.weight.shape[0]
    set_visual_tokens(larger, own, 20, None, None, seed=0)
    table = larger.model.fuser.embed_tokens.weight
    assert table.shape[0] == rows + 20 - tiny.MAX_M == larger.config.fuser_config.vocab_size
    assert larger.config.max_num_visual_tokens == own.max_num_visual_tokens == 20
    assert larger.config.num_followup_visual_tokens == 8
    torch.testing.assert_close(larger(**inputs).logits, before)
    assert 0.1 < table[rows:].std() / larger.config.fuser_config.initializer_range < 2


def test_answer_positions_are_extended_around_their_own():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from fusedvlm.trainers.runs.build_model import extend_positions

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tower = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, max_position_embeddings=77)).eval()
    ids = torch.arange(10)[None]
    old, before = tower.text_model.embeddings.position_embedding.weight.clone(), tower(ids).last_hidden_state
    extend_positions(tower, 512, seed=0)
    table = tower.text_model.embeddings.position_embedding.weight
    assert table.shape == (512, 32)
    assert torch.equal(table[:77], old)
    assert table[77:].std().item() == pytest.approx(old.std().item(), rel=0.05)
    torch.testing.assert_close(tower(ids).last_hidden_state, before)
    assert tower(torch.ones(1, 512, dtype=torch.long)).last_hidden_state.shape == (1, 512, 32)
    extend_positions(tower, 40, seed=0)
    assert torch.equal(tower.text_model.embeddings.position_embedding.weight, old[:40])


# -- words -------------------------------------------------------------------------------------------------------------


def test_help_is_short_and_help_all_is_not():
    short = CliRunner().invoke(app, ["train", "generation", "--help"])
    everything = CliRunner().invoke(app, ["train", "generation", "--help-all"])
    assert short.exit_code == everything.exit_code == 0
    for group in ("Model:", "Data:", "Run:", "Training ("):
        assert group in short.stdout
    assert "--elastic_num_visual_tokens" in short.stdout
    assert "--torch_empty_cache_steps" in everything.stdout
    assert "--torch_empty_cache_steps" not in short.stdout
    assert len(short.stdout.splitlines()) < 140 < len(everything.stdout.splitlines())
    assert "--identity_loss_weight" in CliRunner().invoke(app, ["train", "contrastive", "-h"]).stdout


@pytest.mark.skipif(tiny.OLDEST, reason="older versions have fewer fields")
@pytest.mark.parametrize("stage", STAGES)
def test_the_written_help_is_that_of_the_fields(stage):
    assert (HELP / f"{stage}.txt").read_text() == stage_help(stage) + "\n"


def test_help_imports_neither_torch_nor_transformers():
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fusedvlm.cli import app\n"
        "done = CliRunner().invoke(app, ['train', 'contrastive', '--help'])\n"
        "print(done.exit_code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_recipes_are_listed():
    shown = CliRunner().invoke(app, ["train", "recipes"]).stdout
    for name in ("contrastive", "generation", "variants", "elastic", "single_gpu", "cpu_smoke", "8xa100"):
        assert f"  {name} " in shown


def test_print_config_is_a_recipe_of_the_same_run(tmp_path):
    words = ["train", "generation", "--preset", "cpu_smoke", "--print-config", "--max_steps", "9"]
    shown = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    (tmp_path / "mine.yaml").write_text(shown)
    again = load_recipe(tmp_path / "mine.yaml")
    assert {"stage": again.stage, **again.sections} == {**yaml.safe_load(shown)}
    assert again.sections["training"]["max_steps"] == "9"
    assert again.sections["model"]["query_tokenizer"] == "bytes"


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    words = ["train", "generation", "--preset", "cpu_smoke", "--learning_rte", "1"]
    command = [fork_server.executable("fusedvlm"), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "did you mean 'learning_rate'" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_data_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/smoke\.jsonl"):
        run_recipe("contrastive", preset="cpu_smoke")


def test_the_module_that_accelerate_launches_knows_the_same_words(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(["generations"])
    assert stop.value.code == 2
    assert "did you mean 'generation'" in capsys.readouterr().err
    main(["variants", "--print-config", "--use_cpu"])
    assert yaml.safe_load(capsys.readouterr().out)["variants"]["pairs"][0] == [768, 8]

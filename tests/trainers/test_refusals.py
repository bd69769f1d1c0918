"""What must not train in silence: wrong numbers, other data, rows that cannot be learned, full disks, lost folders."""

import errno
import json
import os
import random

import pytest
import torch
from transformers import TrainerControl, TrainerState

from fusedvlm.console import useful_line
from fusedvlm.files import saying_when_full
from fusedvlm.model_source import require_source
from fusedvlm.tests import tiny
from fusedvlm.tests.processes import run_ranks
from fusedvlm.tests.trainers import smoke
from fusedvlm.tests.trainers.rank_programs import skip_rows
from fusedvlm.trainers import ContrastiveArguments, GenerationArguments, lora_config, run_recipe
from fusedvlm.trainers.callbacks import console_progress
from fusedvlm.trainers.callbacks.console_progress import ConsoleCallback
from fusedvlm.trainers.callbacks.skipped_rows import SkippedRows
from fusedvlm.trainers.recipes.command_words import RUN_IT_FIRST
from fusedvlm.trainers.recipes.recipe_files import load_recipe
from fusedvlm.trainers.recipes.recipe_parsing import gradient_accumulation, plan_run
from fusedvlm.trainers.recipes.run_arguments import ModelArguments
from fusedvlm.trainers.runs.build_model import build_model_and_processor
from fusedvlm.trainers.runs.training_data import data_changes, refuse_stale_manifest

WRONG_NUMBERS = {
    "learning_rate": [-1e-3, 0.0, float("nan"), float("inf")],
    "vision_learning_rate": [-1.0],
    "weight_decay": [-0.1, float("nan")],
    "save_steps": [0, -5, float("nan")],
    "logging_steps": [0],
    "max_steps": [0, -7],
    "per_device_train_batch_size": [0, -1],
    "gradient_accumulation_steps": [0],
    "warmup_steps": [-1],
    "max_grad_norm": [-1.0],
    "seed": [-1],
    "save_total_limit": [0],
    "max_skipped_rows": [-1],
    "max_length": [0, -3],
    "lora_rank": [0],
    "lora_dropout": [1.5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_NUMBERS.items() for value in values]
)
@pytest.mark.parametrize("kind", [ContrastiveArguments, GenerationArguments])
def test_numbers_that_do_nothing_or_harm_are_refused_by_name(kind, name, value, tmp_path):
    with pytest.raises(ValueError, match=name.removesuffix("_steps")):
        kind(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_epochs_count_only_where_steps_do_not(tmp_path):
    with pytest.raises(ValueError, match="num_train_epochs=0"):
        GenerationArguments(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=0)
    GenerationArguments(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=0, max_steps=3)
    with pytest.raises(ValueError, match="add up to 1"):
        GenerationArguments(
            output_dir=str(tmp_path), use_cpu=True, elastic_num_visual_tokens=[1, 2], elastic_probabilities=[0.5, 0.6]
        )


@pytest.mark.parametrize(("batch", "per_device"), [(0, 1), (4, 0), (-4, 2), (4, -2)])
def test_batches_of_nothing_are_refused(batch, per_device):
    with pytest.raises(ValueError, match="must be at least 1"):
        gradient_accumulation(batch, per_device, 1)


# -- rows --------------------------------------------------------------------------------------------------------------


def spoil(path, numbers, text="x " * 40_000):
    """Make rows of a data file too long."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in numbers:
        rows[number]["messages"][0]["content"][-1]["text"] = text
        rows[number]["id"] = f"row {number}"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def recipe_of(stage, folder, data, **training):
    return smoke.smoke_recipe(
        stage,
        folder,
        data,
        model={"model_name_or_path": None},
        training={"max_steps": 2, "save_steps": 100, **training},
    )


@pytest.mark.parametrize(("stage", "workers"), [("contrastive", 0), ("generation", 1)])
def test_one_untrainable_row_does_not_end_a_run_and_is_named(stage, workers, tmp_path, capfd):
    data = smoke.write_data(tmp_path / "data", count=4)
    spoil(data, [2], " ")  # one row asks nothing about its image
    recipe = recipe_of(stage, tmp_path / "run", data, max_steps=3, dataloader_num_workers=workers)
    run_recipe(recipe)
    [entry] = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    assert (entry["id"], entry["reason"]) == ("row 2", "empty question")
    assert json.loads((tmp_path / "run" / "final" / "run.json").read_text())["skipped_rows"] == {"empty question": 1}
    assert "1 rows were skipped (1 empty question)" in capfd.readouterr().err


def test_with_a_limit_of_none_the_first_such_row_ends_the_run_by_its_id(tmp_path):
    data = smoke.write_data(tmp_path / "data", count=4)
    spoil(data, [0, 1], " ")
    recipe = recipe_of("generation", tmp_path / "run", data, max_skipped_rows=0, dataloader_num_workers=1)
    with pytest.raises(ValueError, match=r"more than max_skipped_rows=0: .*empty question; the last is row [01]"):
        run_recipe(recipe)
    assert not (tmp_path / "run" / "final").exists()


def test_a_run_of_which_every_row_was_skipped_is_no_run(tmp_path):
    data = smoke.write_data(tmp_path / "data", count=3)
    spoil(data, [0, 1, 2], "")
    with pytest.raises(ValueError, match="None of 3 rows could be trained on"):
        run_recipe(recipe_of("generation", tmp_path / "run", data))
    assert not (tmp_path / "run" / "final").exists()


def test_the_count_of_skipped_rows_knows_each_once_and_goes_on_from_a_checkpoint(tmp_path):
    count = SkippedRows(tmp_path, limit=2)
    entry = {"id": "a", "source": "s", "reason": "too long", "detail": "9 tokens"}
    count.count(1, [entry])
    count.count(1, [entry, {**entry, "id": "b"}])
    again = SkippedRows(tmp_path, limit=2)
    again.load_state(json.loads(json.dumps(count.state())))
    assert again.describe() == "2 too long"
    with pytest.raises(ValueError, match="3 rows cannot be trained on, more than max_skipped_rows=2") as caught:
        again.count(1, [{**entry, "id": "c"}])
    assert len(str(caught.value)) <= 300


def test_the_limit_of_skipped_rows_is_that_of_all_processes(tmp_path):
    """None of two processes skips more than two; together they skip three, one of them twice."""
    for limit, words in ((3, ""), (2, "3 rows cannot be trained on, more than max_skipped_rows=2: 3 too long")):
        for known, message in run_ranks(2, skip_rows, limit, tmp_path / str(limit)):
            assert known == 3
            assert message.startswith(words)
            assert bool(message) == bool(words)


def test_the_useful_line_of_a_workers_error():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise ValueError("data.jsonl, row 7: question 0 is empty.\nMore about it.")

    with pytest.raises(ValueError) as caught:
        list(torch.utils.data.DataLoader(Rows(), num_workers=1))
    assert "Caught ValueError in DataLoader worker process 0" in str(caught.value)
    assert useful_line(caught.value) == "data.jsonl, row 7: question 0 is empty."
    assert useful_line(ValueError("One.\nTwo.")) == "One."
    assert useful_line(KeyboardInterrupt()) == "KeyboardInterrupt"


# -- data --------------------------------------------------------------------------------------------------------------


def test_shuffled_rows_are_other_data(tmp_path):
    data = smoke.write_data(tmp_path / "data", count=6)
    run_recipe(recipe_of("generation", tmp_path / "run", data, max_steps=1))
    (tmp_path / "run" / "final").rename(tmp_path / "aside")
    lines = data.read_text().splitlines()
    random.Random(1).shuffle(lines)
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"data\.jsonl has other contents \(SHA-256\), if only in another order"):
        run_recipe(recipe_of("generation", tmp_path / "run", data, max_steps=1))


def test_records_are_compared_by_what_both_hold():
    now = {"sources": [{"path": "a", "bytes": 3, "files": [{"path": "a", "sha256": "1"}]}], "samples": 2, "mixture": {}}
    older = {"sources": [{"path": "a", "bytes": 3}], "samples": 2, "mixture": {}}
    assert data_changes(now, now) == data_changes(older, now) == []
    assert data_changes({**older, "samples": 3}, now) == ["data samples: 3 -> 2"]
    assert "4 -> 3 bytes" in data_changes({**older, "sources": [{"path": "a", "bytes": 4}]}, now)[0]


def test_a_manifest_of_other_contents_is_refused():
    manifest = {"sources": [{"files": [{"path": "a.jsonl", "bytes": 3, "sha256": "1"}]}]}
    refuse_stale_manifest(
        manifest, [{"files": [{"path": "a.jsonl", "sha256": "1"}, {"path": "b", "sha256": "9"}]}], "m"
    )
    with pytest.raises(ValueError, match=r"was made of another a\.jsonl"):
        refuse_stale_manifest(manifest, [{"files": [{"path": "a.jsonl", "sha256": "2"}]}], "m")


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["cpu_smoke", "single_gpu", "8xa100"])
def test_a_preset_leaves_a_users_data_alone(preset, tmp_path):
    (tmp_path / "below.yaml").write_text(
        "base: generation\ndata: {sources: [{type: chat, path: mine.jsonl}], fraction: 0.5}\n"
    )
    (tmp_path / "mine.yaml").write_text("base: below.yaml\nmixture_seed: 7\n")
    (tmp_path / "inside.yaml").write_text(f"base: below.yaml\npreset: {preset}\n")
    for recipe in (load_recipe(tmp_path / "mine.yaml", preset), load_recipe(tmp_path / "inside.yaml")):
        assert recipe.sections["data"]["sources"] == [{"type": "chat", "path": "mine.jsonl"}]
        assert recipe.sections["data"]["fraction"] == 0.5
    (tmp_path / "own.yaml").write_text("common: {data: {fraction: 0.1, sources: [{type: chat, path: preset.jsonl}]}}\n")
    mine = load_recipe(tmp_path / "mine.yaml", tmp_path / "own.yaml").sections["data"]
    assert (mine["fraction"], mine["sources"][0]["path"], mine["mixture_seed"]) == (0.5, "mine.jsonl", 7)


def test_smoke_works_with_the_elastic_recipe_and_with_a_users_odd_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = smoke.write_data(tmp_path / "data", count=4)
    recipe = smoke.smoke_recipe("elastic", tmp_path / "elastic", data, model={"model_name_or_path": None})
    run_recipe(recipe)  # m up to 768, as the recipe has it
    (tmp_path / "mine.yaml").write_text(
        f"base: generation\ndata: {{sources: [{{type: chat, path: {data}}}]}}\n"
        "model: {model_name_or_path: null, attn_implementation: flash_attention_2, dtype: bfloat16, num_visual_tokens: 64}\n"
        "training: {output_dir: mine, fp16: true, optim: adamw_bnb_8bit, gradient_accumulation_steps: 7, max_length: 64,"
        " per_device_train_batch_size: 16}\nrun: {global_batch_size: 112, torch_compile_modules: [model.fuser]}\n"
    )
    assert run_recipe("mine.yaml", preset="cpu_smoke") == run_recipe(load_recipe("mine.yaml", "cpu_smoke"))


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./gone", "/gone/away", "runs/gone/final", "a/b/c", "gone"])
def test_a_start_that_is_not_there_is_said_to_be_missing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"model_name_or_path={path} does not exist: run the stage that writes it first"
    ):
        require_source("model.model_name_or_path", path, "config.json", RUN_IT_FIRST)


def test_a_connector_without_stage_1_is_not_sent_to_it(tmp_path):
    arguments = ModelArguments(model_name_or_path="runs/contrastive/final", connector="pool")
    with pytest.raises(ValueError, match=r"pool connector has no stage 1: .* --model.model_name_or_path null"):
        build_model_and_processor(arguments, "generation", tmp_path, 0)


def test_a_folder_above_the_model_is_told_from_the_model(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no config\.json; did you mean .*final\?"):
        require_source("model.model_name_or_path", str(tmp_path), "config.json")
    require_source("model.model_name_or_path", str(tmp_path / "final"), "config.json")
    require_source("model.model_name_or_path", "owner/name", "config.json")


def test_adapters_know_their_base_from_any_working_directory(variant, monkeypatch):
    from transformers import AutoModelForImageTextToText

    monkeypatch.chdir(variant.parent)
    model = AutoModelForImageTextToText.from_pretrained(variant.name, trust_remote_code=True)
    lora_config(model, "fusion")
    assert model.name_or_path == str(variant)


# -- disks and terminals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_to_be_full(error, tmp_path):
    with (
        pytest.raises(OSError, match=r"The disk is full: .* checkpoint-2 was not written\."),
        saying_when_full(tmp_path / "not there yet", "checkpoint-2 was not written."),
    ):
        raise error
    with pytest.raises(RuntimeError, match="something else"), saying_when_full(tmp_path, "x"):
        raise RuntimeError("something else")


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch):
    data = smoke.write_data(tmp_path / "data", count=4)
    original = torch.save

    def full(state, file, *args, **kwargs):
        if "checkpoint-2" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")
        return original(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-2 was not written; free some space and start the command again"):
        run_recipe(recipe_of("generation", tmp_path / "run", data, save_steps=1))
    assert os.listdir(tmp_path / "run" / ".incomplete") == []
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def progress_of(show_bar: bool, steps: int = 3):
    callback, state = (
        ConsoleCallback("stage 2", show_bar=show_bar),
        TrainerState(max_steps=200, is_world_process_zero=True),
    )
    control = TrainerControl()
    callback.on_train_begin(None, state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        callback.on_step_end(None, state, control)
        callback.on_log(None, state, control, logs={"loss": 1.5})
    callback.on_train_end(None, state, control)


def test_a_terminal_shows_a_bar_with_total_and_time_left(capfd):
    progress_of(show_bar=True)
    shown = capfd.readouterr().err
    assert "/200 [" in shown
    assert "step 3: loss 1.5" in shown


def test_a_log_file_gets_lines_with_total_and_time_left(capfd, monkeypatch):
    monkeypatch.setattr(console_progress, "SILENCE", 0.0)
    progress_of(show_bar=False)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "stage 2: 200 steps to go, from step 0."
    assert any(line.startswith("step 2 of 200, ") and line.endswith(" left: loss 1.5") for line in lines)
    assert any(line.startswith("step 2 of 200, ") and line.endswith(" left") for line in lines)


def test_verbosity_does_not_switch_the_bar_off(tmp_path, monkeypatch, capfd):
    import sys

    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    assert ConsoleCallback("x").show_bar
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: False, raising=False)
    assert not ConsoleCallback("x").show_bar


def test_plans_of_smoke_recipes_hold_whole_rows():
    recipe = load_recipe("elastic", "cpu_smoke")
    assert plan_run(recipe).model.text["max_position_embeddings"] > 768 + 10_000
    assert tiny.MAX_M < 768

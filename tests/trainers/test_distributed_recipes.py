"""Two processes over gloo train as one does: both stages, a rank without images, shards, and what saves memory."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers.checkpoints import find_last_checkpoint, problems
from fusedvlm.trainers.recipes import FOLDER

# Plain steps: Adam would turn rounding errors of nearly-zero gradients into steps of full size.
PLAIN = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 3,
    "save_steps": 1,
    "save_total_limit": 3,
    "max_grad_norm": 0.0,
}
RATES = {"contrastive": 2e-3, "generation": 0.3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke.write_data(tmp_path_factory.mktemp("data"), turns=1)


@pytest.fixture(scope="module")
def llm(data, tmp_path_factory):
    """A random LLM that all runs refer to, so that their weights can be compared."""
    from fusedvlm.trainers.runs.build_model import write_random_llm

    sizes = smoke.smoke_recipe("generation", data.parent, data).sections["model"]["text"]
    sizes["initializer_range"] = 0.3  # so that what it says depends on what it sees
    return str(write_random_llm(sizes, tmp_path_factory.mktemp("backbones") / "llm", seed=0))


@pytest.fixture(scope="module")
def make(data, llm):
    """Recipes that begin from new towers and take plain steps."""

    def build(stage, folder, samples=None, **sections):
        training = {**PLAIN, "learning_rate": RATES[stage], **sections.pop("training", {})}
        model = {"model_name_or_path": None, "text": llm, **sections.pop("model", {})}
        return smoke.smoke_recipe(stage, folder, samples or data, model=model, training=training, **sections)

    return build


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory):
    """The stage-2 run of one process in one micro-batch."""
    folder = tmp_path_factory.mktemp("alone")
    assert smoke.run(make("generation", folder, training={"per_device_train_batch_size": 4})) == 0
    return folder


def assert_close(one, other, rtol=1e-4):
    """Two runs agree up to rounding: every logged loss, every saved weight."""
    first, second = smoke.trajectory(one), smoke.trajectory(other)
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=rtol)
    ours, theirs = smoke.weights(one / "final"), smoke.weights(other / "final")
    assert ours.keys() == theirs.keys()
    before = smoke.weights(one / "checkpoint-1")
    assert max((ours[name] - before[name]).abs().max() for name in ours) > 1e-3  # there is something to agree on
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", ["contrastive", "generation"])
def test_two_processes_log_and_learn_what_one_does(stage, make, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert smoke.run(make(stage, one, training={"per_device_train_batch_size": 4})) == 0
    assert smoke.run_ranks(2, make(stage, two, training={"per_device_train_batch_size": 2})) == [0, 0]
    assert_close(one, two)
    assert json.loads((two / "run.json").read_text())["processes"] == 2


def test_a_rank_whose_batches_have_no_image_does_not_hang(make, tmp_path):
    """Three images in twelve samples: in most steps a rank has none."""
    texts = smoke.write_data(tmp_path / "texts", text_only=tuple(range(3, 12)), turns=1)
    one, two = tmp_path / "one", tmp_path / "two"
    assert smoke.run(make("generation", one, texts, training={"per_device_train_batch_size": 4})) == 0
    assert smoke.run_ranks(2, make("generation", two, texts, training={"per_device_train_batch_size": 2})) == [0, 0]
    assert_close(one, two)


def test_shards_are_saved_loaded_and_gathered(make, alone, tmp_path):
    """FSDP2: a killed run resumes from its shards, equals the unsharded run, and saves loadable variants."""
    recipe = make("generation", tmp_path, training={"use_cpu": False, "per_device_train_batch_size": 2})
    smoke.run_ranks(2, recipe, smoke.PretendGpu(smoke.KillAt(3)), smoke.FSDP2)
    checkpoint = find_last_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-2"
    assert {path.name for path in (checkpoint / "pytorch_model_fsdp_0").glob("__*")} == {"__0_0.distcp", "__1_0.distcp"}
    assert smoke.run_ranks(2, recipe, smoke.PretendGpu(), smoke.FSDP2) == [0, 0]
    assert_close(alone, tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["FusedVLMForConditionalGeneration"]
    assert not list(checkpoint.glob("_fsdp*.py"))
    AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def test_a_sharded_run_stops_whole_when_one_process_gets_the_signal(make, alone, tmp_path):
    """FSDP2: the step under way is finished and saved by all, nothing is published, and the same command goes on."""
    recipe = make(
        "generation", tmp_path, training={"use_cpu": False, "per_device_train_batch_size": 2, "save_steps": 100}
    )
    signaled = smoke.OnRank(1, smoke.SignalAt("on_step_begin", 1))
    assert smoke.run_ranks(2, recipe, smoke.PretendGpu(signaled), smoke.FSDP2) == [1, 1]
    checkpoint = find_last_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-2"
    assert problems(checkpoint) == []
    assert not (tmp_path / "final").exists()
    assert smoke.run_ranks(2, recipe, smoke.PretendGpu(), smoke.FSDP2) == [0, 0]
    first, second = smoke.trajectory(alone), smoke.trajectory(tmp_path)
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-4)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", ["contrastive", "generation"])
def test_deepspeed_where_it_is_installed(stage, zero, make, tmp_path):
    pytest.importorskip("deepspeed")
    one, two = tmp_path / "one", tmp_path / "two"
    assert smoke.run(make(stage, one, training={"per_device_train_batch_size": 4})) == 0
    recipe = make(stage, two, training={"use_cpu": False, "per_device_train_batch_size": 2})
    smoke.run_ranks(2, recipe, smoke.PretendGpu(smoke.KillAt(3)), smoke.zero(zero))
    assert find_last_checkpoint(two).name == "checkpoint-2"
    assert smoke.run_ranks(2, recipe, smoke.PretendGpu(), smoke.zero(zero)) == [0, 0]
    assert_close(one, two, rtol=1e-3)
    kind = FusedVLMForContrastiveLearning if stage == "contrastive" else FusedVLMForConditionalGeneration
    kind.from_pretrained(two / "checkpoint-2")


def test_shards_of_stage_1_are_those_of_the_whole(make, tmp_path):
    """Its temperature, a scalar that nothing can shard, is a row meanwhile, and a scalar again in what is saved."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert smoke.run(make("contrastive", one, training={"per_device_train_batch_size": 4})) == 0
    recipe = make("contrastive", two, training={"use_cpu": False, "per_device_train_batch_size": 2})
    smoke.run_ranks(2, recipe, smoke.PretendGpu(smoke.KillAt(3)), smoke.FSDP2)
    assert smoke.run_ranks(2, recipe, smoke.PretendGpu(), smoke.FSDP2) == [0, 0]
    assert_close(one, two)
    model = FusedVLMForContrastiveLearning.from_pretrained(two / "final")
    assert model.logit_scale.shape == ()


SAVERS = {
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "compiled": {
        "run": {
            "torch_compile_modules": ["model.vision_tower", "model.fuser"],
            "torch_compile_modules_backend": "aot_eager",
        }
    },
}


@pytest.mark.parametrize("saver", SAVERS)
def test_what_saves_memory_or_time_changes_nothing(saver, make, alone, tmp_path):
    recipe = make("generation", tmp_path, **SAVERS[saver])
    assert smoke.run(recipe) == 0
    assert_close(alone, tmp_path)


def test_bf16_autocast_with_the_llm_held_in_bf16(make, alone, tmp_path):
    recipe = make("generation", tmp_path, training={"bf16": True}, model={"text_dtype": "bfloat16"})
    assert smoke.run(recipe) == 0
    whole, half = smoke.trajectory(alone), smoke.trajectory(tmp_path)
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in whole], rel=0.05)
    assert [row["loss"] for row in half] != [row["loss"] for row in whole]
    assert {tensor.dtype for tensor in smoke.weights(tmp_path / "final").values()} == {torch.float32}


def test_accelerate_launch_with_the_shipped_cpu_configuration(make, tmp_path, data):
    """The command of the documentation."""
    recipe = make("generation", tmp_path / "out")
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command = [*program, "--config_file", str(FOLDER / "accelerate" / "cpu_gloo.yaml")]
    command += ["-m", "fusedvlm.trainers", "generation", "--config", str(tmp_path / "mine.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [str(tmp_path / "out" / "final")]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2

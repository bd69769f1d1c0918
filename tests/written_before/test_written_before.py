"""What an earlier version wrote loads, resumes and counts as it did then; README.md says how it was made."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.data import load_source
from fusedvlm.evaluation import EvaluationResults
from fusedvlm.hub_cards.card.readback import read_back
from fusedvlm.hub_cards.facts import CardFacts
from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration
from fusedvlm.processing import FusedVLMProcessor
from fusedvlm.quickstart.world import make_sample
from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers.checkpoints import find_last_checkpoint, problems
from fusedvlm.trainers.runs.run_record import read_record

ARCHIVE = Path(__file__).with_name("artifacts.tar.xz")
# The smoke preset has grown since; a run is continued with the settings it was begun with.
THEN = ("--preset", "cpu_smoke", "--model.text.max_position_embeddings", "1024", "--model.fuse_question", "true")
STAGES = {
    "contrastive": ("contrastive", *THEN),
    "generation": ("generation", *THEN, "--max_steps", "4", "--save_steps", "2"),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The archive unpacked, its models referring to the LLM where it lies now (do not change it)."""
    folder = tmp_path_factory.mktemp("written_before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    move_reference(folder)
    return folder


@pytest.fixture(scope="module")
def expected(old):
    """What was measured when the archive was made."""
    return json.loads((old / "expected.json").read_text())


def move_reference(folder: Path) -> None:
    """Write this folder into the configs; all other files keep the hashes of their markers."""
    for config in folder.rglob("config.json"):
        text = config.read_text()
        if "WRITTEN_BEFORE" not in text:
            continue
        config.write_text(text.replace("WRITTEN_BEFORE", str(folder)))
        marker = config.with_name("complete.json")
        listed = json.loads(marker.read_text())
        content = config.read_bytes()
        listed["files"]["config.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        marker.write_text(json.dumps(listed))


def train(stage: str, *more: str) -> None:
    result = CliRunner().invoke(app, ["train", *STAGES[stage], *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def fresh(old, tmp_path_factory):
    """A folder where today's code ran the same two commands on the same data."""
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copytree(old / "data", folder / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for stage in STAGES:
            train(stage, "--model.fusion_row_per_turn", "false")  # what a new run has; the old ones had packed rows
    return folder


def logged_losses(work: Path) -> list[float]:
    return [row["loss"] for row in smoke.trajectory(work)]


def assert_recorded(losses: list[float], recorded: list[float], machine: dict) -> None:
    """To the last bit on the machine of the record; processors differ in the order in which they add."""
    if machine == {"torch": torch.__version__.partition("+")[0], "processor": processor_model()}:
        assert losses == recorded
    assert losses == pytest.approx(recorded, rel=1e-5)


def processor_model() -> list[str]:
    """Vendor, family, model and stepping as Linux names them."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().split("\n\n")[0].splitlines() if table.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return [facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")]


def logits_of(model, processor) -> tuple[list[int], torch.Tensor]:
    """Prompt ids, and logits of the first 16 words after the prompt, as the record has them."""
    image = {"type": "image", "image": make_sample(0, 0).image}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "colour at a1"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        return inputs["input_ids"][0].tolist(), model.eval()(**inputs).logits[0, -1, :16]


def our_classes(folder: Path):
    return FusedVLMForConditionalGeneration.from_pretrained(folder), FusedVLMProcessor.from_pretrained(folder)


def classes_beside_the_weights(folder: Path):
    """The code that was saved with the variant, as `trust_remote_code=True` takes it where ours is not installed."""
    names = "modeling_fusedvlm.FusedVLMForConditionalGeneration", "processing_fusedvlm.FusedVLMProcessor"
    model_class, processor_class = (get_class_from_dynamic_module(name, str(folder)) for name in names)
    assert not issubclass(model_class, FusedVLMForConditionalGeneration)
    return model_class.from_pretrained(folder), processor_class.from_pretrained(folder)


@pytest.mark.parametrize("load", [our_classes, classes_beside_the_weights])
def test_a_variant_answers_as_it_did(old, expected, load):
    folder = old / "runs" / "variants" / "fusedvlm-m8"
    assert problems(folder) == []
    ids, logits = logits_of(*load(folder))
    assert ids == expected["variant"]["input_ids"]
    torch.testing.assert_close(logits, torch.tensor(expected["variant"]["logits"]), atol=1e-5, rtol=0)


def test_a_variant_saved_again_answers_the_same(old, expected, tmp_path):
    """Its config and weights go through today's formats and back; the config then says where the LLM's weights are."""
    folder = old / "runs" / "variants" / "fusedvlm-m8"
    FusedVLMForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path)
    FusedVLMProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (FusedVLMConfig.from_pretrained(place).to_dict() for place in (folder, tmp_path))
    assert after == {**before, "text_model_inside": False}
    smoke.assert_same_weights(folder, tmp_path)
    ids, logits = logits_of(*our_classes(tmp_path))
    assert ids == expected["variant"]["input_ids"]
    torch.testing.assert_close(logits, torch.tensor(expected["variant"]["logits"]), atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_random_llm_and_losses(old, fresh, expected):
    smoke.assert_same_weights(*(folder / "runs" / "contrastive" / "backbones" / "llm" for folder in (old, fresh)))
    for stage, recorded in expected["losses"].items():
        assert_recorded(logged_losses(fresh / "runs" / stage), recorded, expected["machine"])


def test_a_checkpoint_is_resumed_to_the_recorded_losses(old, fresh, expected, tmp_path, monkeypatch):
    """Today's run of the same four steps and the one that was stopped at its second agree in every weight too."""
    shutil.copytree(old / "data", tmp_path / "data")
    shutil.copytree(old / "runs" / "generation", tmp_path / "runs" / "generation")
    shutil.copytree(fresh / "runs" / "contrastive", tmp_path / "runs" / "contrastive")
    work = tmp_path / "runs" / "generation"
    assert find_last_checkpoint(work) == work / "checkpoint-2"
    before = (work / "checkpoint-2" / "model.safetensors").read_bytes()
    assert smoke.weights(work / "checkpoint-2").keys() == smoke.weights(fresh / "runs/generation/final").keys()
    monkeypatch.chdir(tmp_path)
    train("generation")
    assert (work / "checkpoint-2" / "model.safetensors").read_bytes() == before  # continued, not begun again
    assert_recorded(logged_losses(work), expected["losses"]["generation"], expected["machine"])
    ours, theirs = smoke.weights(fresh / "runs/generation/final"), smoke.weights(work / "final")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stage", ["contrastive", "generation", "variants"])
def test_the_record_of_a_run_is_read(old, stage):
    record = read_record(old / "runs" / stage)
    assert record["stage"] == stage
    assert record["recipe"]["training"]["output_dir"] == f"runs/{stage}"


def test_results_beside_a_variant_are_read(old):
    results = EvaluationResults.load(old / "runs" / "variants" / "fusedvlm-m8" / "results.json")
    assert [(row.task, row.num_visual_tokens, row.score) for row in results.scores] == [("list", 8, 0.2)]
    assert results.latencies[0].seconds_per_answer == 0.2


def test_an_old_card_says_what_its_facts_say(old):
    text = (old / "card" / "facts.json").read_text(encoding="utf-8")
    facts, written = CardFacts.from_json(text), json.loads(text)
    assert facts.m == written["counted"]["num_visual_tokens"]
    scores = {(row["task"], row["num_visual_tokens"]): row["score"] for row in written["measured"]["scores"]}
    assert {(row.task, row.num_visual_tokens): row.score for row in facts.measured.scores} == scores
    shown = read_back((old / "card" / "README.md").read_text(encoding="utf-8"))
    assert shown.current == [str(facts.m)]
    assert {row["repository"] for row in shown.family} == {entry["repo_id"] for entry in written["family"]}
    for row in shown.family:
        for task in {task for task, _ in scores}:
            value, _, error = row[task].partition(" ± ")
            assert float(value) == pytest.approx(scores[task, int(row["m"])], abs=0.501 * 10 ** -len(value[2:]))
            assert error


def test_exported_shards_give_the_samples_they_were_made_of(old, monkeypatch):
    monkeypatch.chdir(old)
    shards = load_source({"type": "parquet", "path": "shards/*.parquet"})
    rows = [json.loads(line) for line in (old / "data" / "smoke.jsonl").read_text().splitlines()]
    assert len(shards) == len(rows) == 6
    texts = {sample_text(row["messages"]) for row in rows}
    assert {sample_text(shards[index]["messages"]) for index in range(6)} == texts
    for index in range(6):
        assert len(shards[index]["images"]) == 1


def sample_text(messages: list[dict]) -> str:
    """All that is said in a conversation."""
    said = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
        said += [part for part in parts if part]
    return " | ".join(said)

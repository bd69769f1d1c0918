"""LoRA presets: what they match, what learns, and the way there and back through AutoModel."""

import json
import os
import subprocess

import pytest
import torch
from peft import PeftModel
from transformers import CLIPVisionModel

from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.tests import fork_server, tiny
from fusedvlm.tests.trainers.test_trainers import DATA, arguments
from fusedvlm.trainers import ConversationCollator, GenerationArguments, GenerationTrainer
from fusedvlm.trainers.lora import LORA_PRESETS, add_lora, lora_config

LINEAR = {
    "fusion": 2 * 7,  # two layers of q, k, v, o, gate, up, down
    "vision": 2 * 6,  # two layers of q, k, v, out, fc1, fc2
    "llm": 2 * 7,
}


def load(variant):
    return FusedVLMForConditionalGeneration.from_pretrained(variant)


def train(model, processor, folder, **kwargs):
    options = {"max_steps": 2, "learning_rate": 1e-2, "lora_rank": 4, **kwargs}
    args = arguments(GenerationArguments, folder, **options)
    trainer = GenerationTrainer(model=model, args=args, train_dataset=DATA, processing_class=processor)
    trainer.train()
    return trainer


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_presets_match_every_linear_layer_of_their_part_and_nothing_else(variant, preset):
    model = add_lora(load(variant), preset, rank=4)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == LINEAR[preset]
    assert all(name.startswith(f"base_model.model.{LORA_PRESETS[preset] or 'model.fuser.'}") for name in adapted)
    learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learns) == 2 * LINEAR[preset]
    assert all("lora_" in name for name in learns)


def test_several_presets_add_up(variant):
    model = add_lora(load(variant), ["vision", "fusion", "llm"], rank=2)
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == sum(LINEAR.values())


@pytest.mark.parametrize(
    ("presets", "options", "message"),
    [
        ("fuser", {}, r"Unknown LoRA presets \['fuser'\]; presets are fusion, vision, llm"),
        ([], {}, "Unknown LoRA presets"),
        ("fusion", {"train_also": ["projector"]}, r"train_also=\['projector'\] names no module .*model.projector"),
    ],
)
def test_wrong_presets_are_refused(variant, presets, options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(load(variant), presets, **options)


def test_a_preset_that_matches_nothing_is_refused(backbones):
    tower = CLIPVisionModel(tiny.vision_config())
    with pytest.raises(ValueError, match="'llm' matches no module: CLIPVisionModel has no linear layers under"):
        lora_config(tower, "llm")


def test_an_adapter_needs_something_to_refer_to(backbones, variant):
    with pytest.raises(ValueError, match="save it with save_pretrained"):
        add_lora(tiny.build_model(backbones), "fusion")
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(add_lora(load(variant), "fusion"), "vision")


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_exactly_the_adapters_learn_and_go_through_auto_classes(variant, processor, tmp_path, preset):
    model = load(variant)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = train(model, processor, tmp_path, lora=[preset], lora_train_also=["model.projector"])
    moved = {name for name, parameter in load(variant).named_parameters() if not torch.equal(parameter, before[name])}
    assert not moved  # the base on disk
    assert {"lora" in name or "projector" in name for name in trainer.trainable_names} == {True}
    adapter = tmp_path / "adapter"
    trainer.save_model(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(variant)
    assert (adapter / "adapter_model.safetensors").stat().st_size < (variant / "model.safetensors").stat().st_size

    batch = ConversationCollator(processor)(DATA[:2])
    trained = trainer.model.eval()
    with torch.no_grad():
        expected, base = trained(**batch).logits, load(variant).eval()(**batch).logits
    assert not torch.allclose(expected, base, atol=1e-3)
    torch.save(batch, tmp_path / "batch.pt")
    torch.save(expected, tmp_path / "expected.pt")
    run = subprocess.run(
        [fork_server.executable(), "-c", LOADED_ELSEWHERE, str(adapter), str(tmp_path)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]

    merged = trained.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged", merged=preset == "llm")
    if preset != "llm":
        again = load(tmp_path / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).logits, expected, atol=1e-4, rtol=1e-4)


LOADED_ELSEWHERE = """
import sys
sys.modules["fusedvlm"] = None
import torch
from transformers import AutoModelForImageTextToText
folder, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(**torch.load(out + "/batch.pt")).logits
torch.testing.assert_close(logits, torch.load(out + "/expected.pt"), atol=1e-4, rtol=1e-4)
"""


def test_adapters_resume_bit_for_bit(variant, processor, tmp_path):
    options = {"lora": ["fusion"], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run(folder, resume=None):
        args = arguments(GenerationArguments, folder, **options)
        trainer = GenerationTrainer(model=load(variant), args=args, train_dataset=DATA, processing_class=processor)
        trainer.train(resume_from_checkpoint=resume)
        state = {name: tensor for name, tensor in trainer.model.state_dict().items() if "lora" in name}
        return state, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole, losses = run(tmp_path / "whole")
    resumed, resumed_losses = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed_losses == losses
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_accumulation_is_right_with_adapters(variant, processor, tmp_path):
    """The loss is still summed over the step's labeled tokens."""
    losses = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = train(
            load(variant),
            processor,
            tmp_path,
            lora=["fusion"],
            lora_dropout=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        losses.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
        assert isinstance(trainer.model, PeftModel)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

"""TRL's trainers and collators run unmodified on our model, processor and dataset format."""

import pytest
import torch
import transformers
from datasets import Dataset, Image, List
from packaging.version import Version
from transformers import AutoModelForImageTextToText

from fusedvlm.tests import tiny
from fusedvlm.trainers import ConversationCollator, lora_config

trl = pytest.importorskip("trl")


def conversation(seed: int) -> dict:
    return {
        "images": [tiny.picture(seed)],
        "messages": [
            {"role": "user", "content": f"what is {seed}?"},
            {"role": "assistant", "content": f"answer {seed}"},
        ],
    }


def options(folder, **kwargs) -> dict:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "max_length": None,
        "dataloader_pin_memory": False, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, **kwargs,
    }  # fmt: skip


def dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def trained(model, before) -> set[str]:
    return {n.split(".")[1] for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def snapshot(model) -> dict:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_collator_gives_the_tensors_of_ours(processor):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows = [conversation(1), conversation(2)]
    theirs = DataCollatorForVisionLanguageModeling(processor, max_length=None)([{**row} for row in rows])
    ours = ConversationCollator(processor)(rows)
    for name in ("pixel_values", "image_num_views", "question_input_ids", "question_lengths", "num_visual_tokens"):
        assert torch.equal(theirs[name], ours[name]), name
    for row in range(2):
        one, other = (b["input_ids"][row][b["attention_mask"][row].bool()] for b in (theirs, ours))
        assert torch.equal(one, other)


def test_sft(backbones, processor, tmp_path):
    model = tiny.build_model(backbones)
    before = snapshot(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(tmp_path)),
        train_dataset=dataset([conversation(seed) for seed in range(4)]),
        processing_class=processor,
    )
    trainer.train()
    assert trained(model, before) == {"vision_tower", "merger", "fuser", "projector"}


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="TRL asks for transformers 5.18 here")
def test_sft_on_answers_only(backbones, processor, tmp_path):
    model = tiny.build_model(backbones)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(tmp_path, assistant_only_loss=True)),
        train_dataset=dataset([conversation(seed) for seed in range(4)]),
        processing_class=processor,
    )
    batch = trainer.data_collator([conversation(1), conversation(2)])
    texts = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert texts == ["answer 1 </s>", "answer 2 </s>"]
    trainer.train()


def test_dpo(backbones, processor, tmp_path):
    model, reference = tiny.build_model(backbones), tiny.build_model(backbones)
    before = snapshot(model)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=preferences(),
        processing_class=processor,
    )
    trainer.train()
    assert trained(model, before) == {"vision_tower", "merger", "fuser", "projector"}


def preferences() -> Dataset:
    rows = [
        {
            "images": [tiny.picture(seed)],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what is {seed}?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
        }
        for seed in range(4)
    ]
    return dataset(rows)


def test_dpo_makes_its_own_reference(variant, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(variant, trust_remote_code=True)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=preferences(),
        processing_class=processor,
    )
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are equal at first


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_adapters_by_preset(variant, processor, tmp_path, kind):
    model = AutoModelForImageTextToText.from_pretrained(variant, trust_remote_code=True)
    rows = preferences() if kind == "dpo" else dataset([conversation(seed) for seed in range(4)])
    trainer_class, config = (trl.DPOTrainer, trl.DPOConfig) if kind == "dpo" else (trl.SFTTrainer, trl.SFTConfig)
    trainer = trainer_class(
        model=model,
        args=config(**options(tmp_path)),
        train_dataset=rows,
        processing_class=processor,
        peft_config=lora_config(model, "fusion", rank=4),
    )
    before = snapshot(trainer.model)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".fuser." in name and "lora_" in name for name in moved)


def test_sft_with_its_own_defaults(backbones, processor, tmp_path):
    """Gradient checkpointing on, sequences cut, as TRL has it when nobody says otherwise; some samples are text."""
    text_only = {"images": [], "messages": conversation(5)["messages"]}
    own = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none"}
    model = tiny.build_model(backbones)
    before = snapshot(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**own, use_cpu=True, bf16=False, learning_rate=1e-3),
        train_dataset=dataset([conversation(1), text_only, conversation(2), conversation(3)]),
        processing_class=processor,
    )
    trainer.train()
    assert trained(model, before) == {"vision_tower", "merger", "fuser", "projector"}

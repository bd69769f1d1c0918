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


def shorter_or_longer(completions, **kwargs) -> list[float]:
    return [float(len(str(completion)) % 3) for completion in completions]


def prompts(count: int = 4) -> Dataset:
    rows = [
        {
            "images": [tiny.picture(seed, 60 + 20 * seed, 40)],
            "prompt": [{"role": "user", "content": f"what is {seed}?"}],
        }
        for seed in range(count)
    ]
    return dataset(rows)


def grpo_options(folder, **kwargs) -> dict:
    own = {name: value for name, value in options(folder).items() if name != "max_length"}
    return {**own, "num_generations": 2, "max_completion_length": 4, "gradient_accumulation_steps": 2, **kwargs}


def test_grpo_with_hd_views(variant, processor, tmp_path):
    """Every row keeps its own views and question when TRL shuffles and splits what it generated."""
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
    from fusedvlm.trainers import FusedVLMGRPOTrainer

    model = FusedVLMForConditionalGeneration.from_pretrained(variant)
    before = snapshot(model)
    matched = []

    class Watched(FusedVLMGRPOTrainer):
        def _compute_loss(self, model, inputs):
            for ids, packed in zip(inputs["prompt_ids"], inputs["packed_rows"], strict=True):
                question = processor.query_tokenizer.decode(packed["question_input_ids"])
                matched.append(question.strip() in processor.tokenizer.decode(ids))
            return super()._compute_loss(model, inputs)

    trainer = Watched(
        model=model,
        reward_funcs=shorter_or_longer,
        args=trl.GRPOConfig(**grpo_options(tmp_path, beta=0.1)),
        train_dataset=prompts(),
        processing_class=processor,
    )
    trainer.train()
    assert len(matched) == 8
    assert all(matched)
    assert trained(model, before) <= {"vision_tower", "merger", "fuser", "projector"}
    first = next(row for row in trainer.state.log_history if "kl" in row)
    assert first["kl"] == pytest.approx(0, abs=1e-5)  # policy and reference are equal at first
    assert processor.image_processor.__class__.__name__.startswith("FusedVLM")


def test_stock_grpo_is_refused_with_what_to_use(variant, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(variant, trust_remote_code=True)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=shorter_or_longer,
        args=trl.GRPOConfig(**grpo_options(tmp_path)),
        train_dataset=prompts(),
        processing_class=processor,
    )
    with pytest.raises(ValueError, match=r"use fusedvlm\.trainers\.FusedVLMGRPOTrainer"):
        trainer.train()


def test_dpo_with_a_model_of_our_own_class_needs_no_trust(variant, processor, tmp_path):
    """Where this package is imported, TRL finds its classes for the reference model by itself."""
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration

    trainer = trl.DPOTrainer(
        model=FusedVLMForConditionalGeneration.from_pretrained(variant),
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=preferences(),
        processing_class=processor,
    )
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)

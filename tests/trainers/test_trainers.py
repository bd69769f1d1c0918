"""Both trainers on CPU: what learns, what is logged, what is saved, what is refused."""

import json

import pytest
import torch
from transformers import AutoProcessor

from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.tests import tiny
from fusedvlm.trainers import (
    ContrastiveArguments,
    ContrastiveTrainer,
    ConversationCollator,
    GenerationArguments,
    GenerationTrainer,
    group_parameters,
    select_trainable,
)
from fusedvlm.trainers.checkpoints import mark_complete


def sample(seed: int, turns: int = 2) -> dict:
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"question {seed} {turn}?"},
            {"role": "assistant", "content": f"answer {seed + turn}"},
        ]
    return {"images": [tiny.picture(seed)], "messages": messages}


DATA = [sample(seed, turns=1 + seed % 2) for seed in range(8)]


def arguments(kind, folder, **kwargs):
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        "seed": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(**{**defaults, **kwargs})


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def top(names) -> set[str]:
    return {".".join(name.split(".")[:2]) if name.startswith("model.") else name.split(".")[0] for name in names}


def test_generation_trains_exactly_vision_fusion_and_projection(backbones, processor, tmp_path):
    model = tiny.build_model(backbones)
    before = snapshot(model)
    trainer = GenerationTrainer(
        model=model,
        args=arguments(GenerationArguments, tmp_path, max_steps=12),
        train_dataset=DATA,
        processing_class=processor,
    )
    trainer.train()
    moved = changed(model, before)
    assert top(moved) == {"model.vision_tower", "model.merger", "model.fuser", "model.projector"}
    assert moved <= set(trainer.trainable_names)
    untouched = set(trainer.trainable_names) - moved
    assert untouched == set()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_contrastive_trains_everything_it_has_and_logs_both_parts(model, processor, tmp_path):
    stage1 = tiny.build_contrastive_model(model)
    before = snapshot(stage1)
    trainer = ContrastiveTrainer(
        model=stage1,
        args=arguments(ContrastiveArguments, tmp_path, max_steps=12),
        train_dataset=DATA,
        processing_class=processor,
    )
    trainer.train()
    assert top(changed(stage1, before)) == {
        "model.vision_tower", "model.merger", "model.fuser", "answer_tower", "answer_projection",
        "image_projection", "logit_scale",
    }  # fmt: skip
    rows = [row for row in trainer.state.log_history if "contrastive_loss" in row]
    assert len(rows) == 12
    for row in rows:
        assert row["loss"] == pytest.approx(row["contrastive_loss"] + row["identity_loss"], abs=1e-3)
        assert 0 <= row["retrieval_at_1"] <= 1
    assert rows[-1]["contrastive_loss"] < rows[0]["contrastive_loss"]


def test_contrastive_loss_is_the_models_own(model, processor, tmp_path):
    stage1 = tiny.build_contrastive_model(model)
    trainer = ContrastiveTrainer(
        model=stage1, args=arguments(ContrastiveArguments, tmp_path), train_dataset=DATA, processing_class=processor
    )
    batch = ConversationCollator(processor, with_answers=True)(DATA[:4])
    inputs = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask", "labels")}
    own = stage1(**inputs, return_loss=True)
    assert trainer.compute_loss(stage1, batch).item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert own.loss.item() == pytest.approx((own.contrastive_loss + own.identity_loss).item(), rel=1e-6)
    assert own.query_states.shape == (batch["num_visual_tokens"].sum(), tiny.WIDTH)


def test_accumulated_micro_batches_equal_one_batch(backbones, processor, tmp_path):
    """The loss is summed over labeled tokens of the whole step, whatever the split."""
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = tiny.build_model(backbones)
        args = arguments(
            GenerationArguments,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            max_grad_norm=0.0,
        )
        GenerationTrainer(model=model, args=args, train_dataset=DATA, processing_class=processor).train()
        weights.append(model.model.projector.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-3)


def test_checkpoint_is_a_loadable_variant_with_its_processor(backbones, processor, tmp_path):
    model = tiny.build_model(backbones)
    args = arguments(GenerationArguments, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    GenerationTrainer(model=model, args=args, train_dataset=DATA, processing_class=processor).train()
    checkpoint = tmp_path / "checkpoint-2"
    again = FusedVLMForConditionalGeneration.from_pretrained(checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.state_dict()[name]), name
    assert AutoProcessor.from_pretrained(checkpoint).max_num_visual_tokens == 12
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation.get("use_cache", True) is True  # Trainer's own default would make every answer slow
    assert generation["suppress_tokens"] == [model.config.image_token_id]
    names = json.loads((checkpoint / "config.json").read_text())
    assert names.get("use_cache", True) is True
    assert names["text_model_name_or_path"] == str(backbones / "llm")
    assert not (checkpoint / "training_args.bin").exists()  # a pickle that nothing reads


def test_resumed_run_equals_the_uninterrupted_one(backbones, processor, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "elastic_num_visual_tokens": [1, 4, 12]}

    def run(folder, resume=None):
        model = tiny.build_model(backbones)
        args = arguments(GenerationArguments, folder, **options)
        trainer = GenerationTrainer(model=model, args=args, train_dataset=DATA, processing_class=processor)
        trainer.train(resume_from_checkpoint=resume)
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole, losses = run(tmp_path / "whole")
    resumed, resumed_losses = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed_losses == losses
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_run_begun_before_the_field_goes_on_with_packed_rows(backbones, processor, tmp_path, capsys):
    """The script that began it builds a model with a row per turn today."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run(folder, resume=None, **fields):
        model = tiny.build_model(backbones, **fields)
        args = arguments(GenerationArguments, folder, **options)
        trainer = GenerationTrainer(model=model, args=args, train_dataset=DATA, processing_class=processor)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", fusion_row_per_turn=False)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    config = json.loads((checkpoint / "config.json").read_text())
    del config["fusion_row_per_turn"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    mark_complete(checkpoint)
    resumed = run(tmp_path / "resumed", resume=str(checkpoint))
    assert resumed.config.fusion_row_per_turn is False
    assert "trained with fusion_row_per_turn=False" in capsys.readouterr().err
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    other_rows = run(tmp_path / "new")
    assert not torch.equal(other_rows.model.projector.weight, whole.model.projector.weight)


def test_checkpointed_layers_learn_the_same_from_turns(backbones, processor, tmp_path):
    weights = []
    for checkpointing in (False, True):
        model = tiny.build_model(backbones)
        args = arguments(GenerationArguments, tmp_path, gradient_checkpointing=checkpointing, max_grad_norm=0.0)
        GenerationTrainer(model=model, args=args, train_dataset=DATA, processing_class=processor).train()
        weights.append(model.model.projector.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-3)


def test_frozen_tower_and_its_own_learning_rate(backbones):
    model = tiny.build_model(backbones)
    names = select_trainable(model, "generation", ("model.vision_tower.",))
    assert top(names) == {"model.merger", "model.fuser", "model.projector"}
    select_trainable(model, "generation")
    groups = group_parameters(model, 1e-3, 0.1, vision_learning_rate=1e-5)
    assert {(g.name, g.learning_rate, g.weight_decay) for g in groups} == {
        ("vision, decay", 1e-5, 0.1), ("vision, no decay", 1e-5, 0.0),
        ("fusion, decay", 1e-3, 0.1), ("fusion, no decay", 1e-3, 0.0),
    }  # fmt: skip
    covered = [name for group in groups for name in group.names]
    assert sorted(covered) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    no_decay = {name for group in groups if group.weight_decay == 0 for name in group.names}
    assert all(name.endswith("bias") or "norm" in name or "layrnorm" in name for name in no_decay)


@pytest.mark.parametrize(
    ("stage", "freeze", "message"),
    [
        ("pretraining", (), "Unknown stage 'pretraining'"),
        ("generation", ("vision_tower",), "freeze='vision_tower' matches no parameter"),
        ("generation", ("model.",), "Nothing is left to learn"),
    ],
)
def test_wrong_selections_are_refused(backbones, stage, freeze, message):
    with pytest.raises(ValueError, match=message):
        select_trainable(tiny.build_model(backbones), stage, freeze)


def test_non_finite_loss_stops_before_the_weights(backbones, processor, tmp_path):
    model = tiny.build_model(backbones)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    before = snapshot(model)
    trainer = GenerationTrainer(
        model=model, args=arguments(GenerationArguments, tmp_path), train_dataset=DATA, processing_class=processor
    )
    named = [{**row, "id": f"coco/{number}"} for number, row in enumerate(DATA[:4])]
    trainer.train_dataset = named
    with pytest.raises(ValueError, match=r"loss is nan at step 0 \(samples coco/"):
        trainer.train()
    record = json.loads((tmp_path / "nonfinite_step0_rank0.json").read_text())
    assert sorted(record["ids"]) == [row["id"] for row in named]
    assert all("question" in prompt for prompt in record["prompts"])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not n.startswith("lm_head"))


def test_evaluation_reports_losses(model, processor, tmp_path):
    stage1 = tiny.build_contrastive_model(model)
    trainer = ContrastiveTrainer(
        model=stage1, args=arguments(ContrastiveArguments, tmp_path), eval_dataset=DATA, processing_class=processor
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    logged = trainer.state.log_history[-1]
    assert logged["eval_loss"] == pytest.approx(
        logged["eval_contrastive_loss"] + logged["eval_identity_loss"], abs=1e-4
    )


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns"):
        arguments(GenerationArguments, tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match="3 entries for 2 counts"):
        arguments(GenerationArguments, tmp_path, elastic_num_visual_tokens=[1, 2], elastic_probabilities=[0.1] * 3)
    with pytest.raises(ValueError, match="positive counts"):
        arguments(GenerationArguments, tmp_path, elastic_num_visual_tokens=[0, 2])


def test_elastic_counts_beyond_the_model_are_refused(backbones, processor, tmp_path):
    with pytest.raises(ValueError, match="elastic_num_visual_tokens=13 is out of range"):
        GenerationTrainer(
            model=tiny.build_model(backbones),
            processing_class=processor,
            train_dataset=DATA,
            args=arguments(GenerationArguments, tmp_path, elastic_num_visual_tokens=[1, 13]),
        )


def test_a_trainer_needs_a_processor(model, tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        GenerationTrainer(model=model, args=arguments(GenerationArguments, tmp_path), train_dataset=DATA)


def test_contrastive_model_needs_an_answer_tower(model):
    with pytest.raises(ValueError, match="answer_config"):
        FusedVLMForContrastiveLearning(model.config)

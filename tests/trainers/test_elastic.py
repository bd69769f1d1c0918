"""Elastic m: dropping placeholders equals building the batch at that m; draws depend on seed and step alone."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import fusedvlm
from fusedvlm.tests import tiny
from fusedvlm.tests.trainers.test_trainers import DATA, arguments
from fusedvlm.trainers import (
    ConversationCollator,
    GenerationArguments,
    GenerationTrainer,
    draw_num_visual_tokens,
    draw_per_sample,
    shrink_visual_tokens,
)
from fusedvlm.trainers.elastic import join_versions

SAMPLES = [
    {
        "images": [tiny.picture(1), tiny.picture(2, 30, 50)],
        "messages": [
            tiny.user(text="one?") | {"content": [{"type": "image"}, {"type": "text", "text": "one?"}]},
            tiny.assistant("yes"),
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two?"}]},
            tiny.assistant("no, it is not"),
        ],
    },
    {"images": [], "messages": [tiny.user(text="hello"), tiny.assistant("hi")]},
    {"images": [tiny.picture(3)], "messages": [tiny.user(text="three?"), tiny.assistant("a cat")]},
]


@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_shrinking_equals_building_at_that_m(processor, m):
    large = ConversationCollator(processor, num_visual_tokens=12, num_followup_visual_tokens=3)(SAMPLES)
    small = ConversationCollator(processor, num_visual_tokens=m, num_followup_visual_tokens=3)(SAMPLES)
    shrunk = shrink_visual_tokens(large, m, processor.image_token_id, processor.tokenizer.pad_token_id)
    assert set(shrunk) == set(small)
    for name in small:
        assert torch.equal(shrunk[name], small[name]), name


def test_text_only_batches_pass_through(processor):
    batch = ConversationCollator(processor)(SAMPLES[1:2])
    assert shrink_visual_tokens(batch, 1, processor.image_token_id, 0) is batch


def test_draws_repeat_and_follow_their_distribution():
    draws = [draw_num_visual_tokens([1, 4, 16], step, seed=7, probabilities=[0.5, 0.25, 0.25]) for step in range(2000)]
    assert draws == [draw_num_visual_tokens([1, 4, 16], step, 7, [0.5, 0.25, 0.25]) for step in range(2000)]
    assert draws != [draw_num_visual_tokens([1, 4, 16], step, 8, [0.5, 0.25, 0.25]) for step in range(2000)]
    counts = Counter(draws)
    # 6 standard deviations of a binomial share: false alarm below 1e-8
    for m, share in ((1, 0.5), (4, 0.25), (16, 0.25)):
        assert abs(counts[m] / 2000 - share) < 6 * (share * (1 - share) / 2000) ** 0.5


def test_shrinking_per_sample_equals_building_each(processor):
    large = ConversationCollator(processor, num_visual_tokens=12, num_followup_visual_tokens=3)(SAMPLES)
    shrunk = shrink_visual_tokens(
        large, torch.tensor([2, 7, 5]), processor.image_token_id, processor.tokenizer.pad_token_id
    )
    for number, m in ((0, 2), (2, 5)):
        alone = ConversationCollator(processor, num_visual_tokens=m, num_followup_visual_tokens=3)([SAMPLES[number]])
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(shrunk[name][number, :length], alone[name][0]), name
        assert shrunk["attention_mask"][number].sum() == length
    # both questions about the first image, the one about the second, and that of the last sample; m' stays below m
    assert shrunk["num_visual_tokens"].tolist() == [2, 2, 2, 5]


def test_draws_per_sample_depend_on_step_rank_and_micro_batch():
    def draw(*place):
        return draw_per_sample([1, 4, 16], 64, 5, 7, *place).tolist()

    first = draw(0, 0)
    assert first == draw(0, 0)
    assert set(first) == {1, 4, 16}
    assert first not in (draw(1, 0), draw(0, 1))


def elastic_trainer(backbones, processor, folder, **kwargs):
    args = arguments(GenerationArguments, folder, elastic_num_visual_tokens=[1, 4, 12], **kwargs)
    model = tiny.build_model(backbones)
    return GenerationTrainer(
        model=model, args=args, train_dataset=DATA, eval_dataset=DATA[:4], processing_class=processor
    )


def test_per_sample_draws_are_accumulated_and_logged_per_m(backbones, processor, tmp_path):
    trainer = elastic_trainer(
        backbones,
        processor,
        tmp_path,
        elastic_per_sample=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=4,
        logging_steps=4,
    )
    seen = []
    draw = trainer.draw
    trainer.draw = lambda count: seen.append(draw(count)) or seen[-1]
    trainer.train()
    place = [(step, micro) for step in range(4) for micro in range(2)]
    expected = [draw_per_sample([1, 4, 12], 2, step, 0, 0, micro).tolist() for step, micro in place]
    assert [drawn.tolist() for drawn in seen] == expected
    logged = trainer.state.log_history[0]
    assert {name for name in logged if name.startswith("loss_m_")} == {
        f"loss_m_{m}" for m in {m for drawn in expected for m in drawn}
    }


def test_one_step_logs_its_loss_under_its_m(backbones, processor, tmp_path):
    trainer = elastic_trainer(backbones, processor, tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    for step, row in enumerate(row for row in trainer.state.log_history if "loss" in row):
        m = draw_num_visual_tokens([1, 4, 12], step, 0)
        assert row[f"loss_m_{m}"] == pytest.approx(row["loss"], abs=1e-3)
        assert sum(name.startswith("loss_m_") for name in row) == 1


def test_evaluation_goes_through_every_m(backbones, processor, tmp_path):
    trainer = elastic_trainer(backbones, processor, tmp_path)
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert logged["eval_loss_m_12"] == pytest.approx(logged["eval_loss"], rel=1e-3)
    assert logged["eval_loss_m_1"] != pytest.approx(logged["eval_loss"], rel=1e-3)


def test_distillation_pulls_small_m_towards_the_largest(backbones, processor, tmp_path):
    """With everything but the weight equal, the logged divergence falls further."""

    def run(weight):
        args = {"distillation_weight": weight, "elastic_probabilities": [1.0, 0.0, 0.0], "max_steps": 40}
        trainer = elastic_trainer(backbones, processor, tmp_path, learning_rate=3e-3, **args)
        trainer.train()
        rows = [row["distillation_loss"] for row in trainer.state.log_history if "distillation_loss" in row]
        return sum(rows[-5:])

    assert run(8.0) < run(1e-9)


def test_the_largest_m_is_its_own_teacher(backbones, processor, tmp_path):
    probabilities = [0.0, 0.0, 1.0]
    losses = []
    for weight in (0.0, 5.0):
        trainer = elastic_trainer(
            backbones, processor, tmp_path, distillation_weight=weight, elastic_probabilities=probabilities
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


def test_several_m_of_a_step_share_the_views_and_have_the_gradients_of_one_step_each(backbones, processor):
    """Conversations of several images and turns, and without an image; by hand, m by m, and all at once."""
    model = tiny.build_model(backbones).train()
    batch = ConversationCollator(processor, num_visual_tokens=12, num_followup_visual_tokens=3)(SAMPLES)
    ids = (processor.image_token_id, processor.tokenizer.pad_token_id)
    versions = [shrink_visual_tokens(batch, m, *ids) for m in (12, 1, 5)]
    passes = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: passes.append(1))

    def gradients(*batches):
        model.zero_grad()
        losses = [model(**one, num_items_in_batch=torch.tensor(9.0)).loss for one in batches]
        sum(losses).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return sum(loss.item() for loss in losses), found

    alone_loss, alone = gradients(*versions)
    assert len(passes) == 3
    joined = join_versions(versions, ids[1])
    assert joined["input_ids"].shape[0] == 9
    assert joined["num_visual_tokens"].shape[0] == 3
    loss, together = gradients(joined)
    hook.remove()
    assert len(passes) == 4
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    assert set(together) == set(alone)
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def test_a_trainer_with_several_m_per_step_takes_their_mean_and_logs_each(backbones, processor, tmp_path):
    trainer = elastic_trainer(
        backbones, processor, tmp_path, elastic_samples_per_step=3, max_steps=3, gradient_accumulation_steps=2
    )
    drawn = []
    more = trainer.draw_more
    trainer.draw_more = lambda: drawn.append(more()) or drawn[-1]
    trainer.train()
    assert drawn[0] == drawn[1]  # micro-batches of a step agree
    assert {m for further in drawn for m in further} <= {1, 4, 12}
    for step, row in enumerate(row for row in trainer.state.log_history if "loss" in row):
        every = [draw_num_visual_tokens([1, 4, 12], step, 0), *drawn[2 * step]]
        parts = [row[f"loss_m_{m}"] for m in every]
        assert {name for name in row if name.startswith("loss_m_")} == {f"loss_m_{m}" for m in every}
        assert row["loss"] == pytest.approx(sum(parts) / 3, abs=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"elastic_samples_per_step": 0},
        {"elastic_samples_per_step": 2, "elastic_per_sample": True},
        {"elastic_samples_per_step": 2, "distillation_weight": 0.5},
        {"elastic_samples_per_step": 2, "elastic_num_visual_tokens": None},
    ],
    ids=str,
)
def test_several_m_per_step_are_refused_where_they_mean_nothing(tmp_path, options):
    with pytest.raises(ValueError, match="elastic_samples_per_step"):
        arguments(GenerationArguments, tmp_path, **{"elastic_num_visual_tokens": [1, 4], **options})


def test_versions_with_other_questions_are_refused(model, processor):
    batch = ConversationCollator(processor, num_visual_tokens=12)(SAMPLES)
    with pytest.raises(ValueError, match="2 entries per version for 4 questions"):
        model(**{**batch, "num_visual_tokens": torch.ones(3, 2, dtype=torch.long)})


def test_options_without_several_m_are_refused(tmp_path):
    for option in ({"elastic_per_sample": True}, {"distillation_weight": 0.5}):
        with pytest.raises(ValueError, match="set elastic_num_visual_tokens"):
            arguments(GenerationArguments, tmp_path, **option)


def test_training_computes_logits_of_labeled_tokens_only(backbones, processor):
    """The head's output is the largest tensor of a step; the loss and its gradients are those of all logits."""
    model = tiny.build_model(backbones)
    batch = ConversationCollator(processor, num_visual_tokens=12)(DATA[:4])
    whole = model(**batch, num_items_in_batch=torch.tensor(9.0))
    whole.loss.backward()
    expected = model.model.projector.weight.grad.clone()
    model.zero_grad()
    part = model(**batch, answer_logits_only=True, num_items_in_batch=torch.tensor(9.0))
    part.loss.backward()
    labeled = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(part.logits, whole.logits[:, :-1][labeled], rtol=1e-5, atol=1e-5)
    assert part.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    torch.testing.assert_close(model.model.projector.weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_the_documented_comparison_is_the_record():
    root = Path(fusedvlm.__file__).parent.parent
    page = (root / "docs" / "elastic.md").read_text(encoding="utf-8")
    record = (root / "docs" / re.search(r"\((\S+elastic_cpu\S+\.md)\)", page).group(1)).read_text(encoding="utf-8")

    def scores(text):
        return [re.findall(r"\b0\.\d{3}\b(?= \|)", line)[-6:] for line in text.splitlines() if "| 0.1" in line]

    assert len(scores(page)) == 3
    assert scores(page) == scores(record)


@pytest.mark.parametrize(
    ("drawn", "trained", "is_range", "listed"),
    [
        ({"elastic_range": [1, 12]}, [1, 7, 12], True, [1, 7, 12]),
        ({"elastic_range": [1, 12]}, [7, 12], True, [1, 7, 12]),
        ({"elastic_range": [1, 8]}, [1, 7, 12], False, [1, 7, 12]),  # the dial goes further than what was drawn
        ({"elastic_range": [4, 12]}, [1, 7, 12], False, [1, 7, 12]),
        ({"elastic_num_visual_tokens": [1, 7, 12]}, [1, 7, 12], False, [1, 7, 12]),
        ({}, [1, 7, 12], False, [1, 7, 12]),
    ],
)
def test_a_checkpoint_says_whether_every_m_was_trained(
    backbones, processor, tmp_path, drawn, trained, is_range, listed
):
    model = tiny.build_model(backbones, trained_num_visual_tokens=trained)
    own = tiny.build_tiny_processor(model)
    args = arguments(GenerationArguments, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **drawn)
    trainer = GenerationTrainer(model=model, args=args, train_dataset=DATA, processing_class=own)
    assert model.config.trained_num_visual_tokens_is_range is False
    trainer.train()
    for name in ("config.json", "processor_config.json"):
        written = json.loads((tmp_path / "checkpoint-1" / name).read_text())
        assert written["trained_num_visual_tokens_is_range"] is is_range
        assert written["trained_num_visual_tokens"] == listed

"""Micro-batches of one source each, m and loss per source and answer, phases that end by their loss."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from fusedvlm.data import Mixture
from fusedvlm.data.mixing.grouped import GroupedBatches, micro_batches, source_names, source_of_micro_batch
from fusedvlm.tests import tiny
from fusedvlm.tests.trainers.test_trainers import arguments, sample
from fusedvlm.trainers import ConversationCollator, GenerationArguments, GenerationTrainer, shrink_visual_tokens
from fusedvlm.trainers.collators import IGNORED
from fusedvlm.trainers.elastic import count_shares, draw_from, draw_per_sample
from fusedvlm.trainers.generation import answer_losses, doublings, first_tokens

WORDS = [{**sample(seed, turns=1), "source": "word"} for seed in range(6)]
LONG = [{**sample(seed, turns=2), "source": "long"} for seed in range(6, 10)]
DATA = [*WORDS, *LONG]
GROUPS = {"word": 3, "long": 2}


@pytest.mark.parametrize(("ranks", "largest"), [(1, 8), (1, 2), (2, 8), (3, 1)])
def test_every_step_holds_the_groups_and_every_micro_batch_one_source(ranks, largest):
    batches = GroupedBatches(DATA, GROUPS, largest, ranks, seed=3)
    drawn, per_step = list(batches), micro_batches(GROUPS, largest) * ranks
    assert len(drawn) == len(batches) == batches.steps * per_step
    for start in range(0, len(drawn), per_step):
        step = drawn[start : start + per_step]
        for rank in range(ranks):
            rows = [DATA[i]["source"] for batch in step[rank::ranks] for i in batch]
            assert rows == ["word"] * 3 + ["long"] * 2  # the order of the groups
        names = [{DATA[i]["source"] for i in batch} for batch in step]
        assert names == [{name} for name in source_of_micro_batch(GROUPS, largest) for _ in range(ranks)]
    assert list(GroupedBatches(DATA, GROUPS, largest, ranks, seed=3)) == drawn
    assert list(GroupedBatches(DATA, GROUPS, largest, ranks, seed=4)) != drawn


def test_no_row_comes_again_before_all_of_its_source_have_come_and_epochs_go_on():
    batches = GroupedBatches(DATA, {"word": 2, "long": 2}, largest=2)
    seen: dict[str, list[int]] = {"word": [], "long": []}
    for epoch in range(2):
        batches.set_epoch(epoch)
        for batch in batches:
            seen[DATA[batch[0]]["source"]] += batch
    assert batches.steps == 3
    assert set(Counter(seen["word"]).values()) == {2}
    assert Counter(seen["long"]).most_common() == [(i, 3) for i in dict.fromkeys(seen["long"])]
    assert sorted(seen["word"][:6]) == list(range(6))
    assert sorted(seen["long"][:4]) == list(range(6, 10))


def test_two_ranks_together_take_the_rows_of_one_with_twice_the_groups():
    one = list(GroupedBatches(DATA, {"word": 2, "long": 2}, 8, ranks=1))
    two = list(GroupedBatches(DATA, {"word": 1, "long": 1}, 8, ranks=2))
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(two[::2], two[1::2], strict=True)]


def test_sources_are_known_of_mixtures_in_every_epoch_and_of_what_reads_through_them():
    mixture = Mixture([WORDS, LONG], names=["word", "long"], weights=[1, 1])
    for epoch in (0, 1):
        mixture.start_epoch(epoch)
        assert source_names(mixture).tolist() == [mixture[i]["source"] for i in range(len(mixture))]


@pytest.mark.parametrize(
    ("dataset", "groups", "message"),
    [
        (DATA, {"word": 1, "short": 1}, "names short, but the data's sources are long, word"),
        ([sample(0)], {"word": 1}, "a list does not tell"),
        (iter(DATA), {"word": 1}, "a stream does not tell"),
    ],
)
def test_data_that_cannot_be_grouped_is_refused(dataset, groups, message):
    with pytest.raises(ValueError, match=message):
        GroupedBatches(dataset, groups, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_groups": {"word": 0}}, "positive numbers of samples"),
        ({"batch_groups": "{word"}, "batch_groups is not JSON"),
        ({"batch_groups": GROUPS, "gradient_accumulation_steps": 3}, "contradicts batch_groups"),
        ({"batch_groups": GROUPS, "train_sampling_strategy": "sequential"}, "each order the rows"),
        ({"elastic_range": [4, 2]}, "smallest and the largest m"),
        ({"elastic_range": [1, 4], "elastic_num_visual_tokens": [1, 4]}, "state one"),
        ({"elastic_by_source": {"word": 4}}, "batch_groups .not set. does not"),
        ({"batch_groups": GROUPS, "elastic_by_source": {"word": 4}}, "leaves sources out"),
        ({"batch_groups": GROUPS, "elastic_range": [1, 4], "elastic_by_source": {"word": "4-1"}}, "word: A range"),
        ({"elastic_followup": [0]}, "elastic_followup must be positive"),
        ({"loss_per": "answer", "label_smoothing_factor": 0.1}, "goes with neither"),
        ({"until_loss": 0.0}, "until_loss=0.0 must be a positive number"),
        ({"elastic_range": [1, 4], "elastic_warmup_minimum": 5}, "exceeds every m"),
    ],
)
def test_arguments_that_cannot_work_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(GenerationArguments, tmp_path, **wrong)


def test_shares_follow_the_words():
    assert count_shares(7) == count_shares("7") == {7: 1.0}
    shares = count_shares("1-32")
    assert sum(shares.values()) == pytest.approx(1)
    octaves = [sum(shares[m] for m in range(low, 2 * low)) for low in (1, 2, 4, 8, 16)]
    assert octaves == pytest.approx([np.log(2) / np.log(33)] * 5)  # every doubling equally often
    mixed = count_shares([32, "1-32", "8-32"])
    assert mixed[32] == pytest.approx((1 + shares[32] + count_shares("8-32")[32]) / 3)
    assert mixed[3] == pytest.approx(shares[3] / 3)
    for wrong in ([], "many", "3-", 0, None, True, {"low": 1}):
        with pytest.raises(ValueError, match=r"number of visual tokens"):
            count_shares(wrong)


@pytest.mark.parametrize(("m", "followup"), [(12, 2), (5, 1), (2, 3)])
def test_shrinking_to_m_and_followup_equals_building_at_both(processor, m, followup):
    def build(*counts):
        return ConversationCollator(processor, *counts)(LONG)

    large = build(12, 4)
    shrunk = shrink_visual_tokens(
        large, m, processor.image_token_id, processor.tokenizer.pad_token_id, num_followup_visual_tokens=followup
    )
    small = build(m, min(m, followup))  # never more for a later question than for the first
    assert set(shrunk) == set(small)
    for name in small:
        assert torch.equal(shrunk[name], small[name]), name


def trainer_of(backbones, processor, folder, data=DATA, callbacks=(), **kwargs):
    defaults = {
        "batch_groups": GROUPS, "elastic_range": [2, 9], "elastic_by_source": {"long": [12, "6-8"]},
        "elastic_followup": [1, 3], "loss_per": "answer", "max_steps": 4,
    }  # fmt: skip
    args = arguments(GenerationArguments, folder, **{**defaults, **kwargs})
    model = tiny.build_model(backbones)
    return GenerationTrainer(
        model=model, args=args, train_dataset=data, processing_class=processor, callbacks=list(callbacks)
    )


def test_every_source_draws_its_own_m_and_the_loss_is_the_mean_over_answers(backbones, processor, tmp_path):
    """The first step's loss and gradients equal those of a loop over the answers of the step, one at a time."""
    trainer = trainer_of(backbones, processor, tmp_path, max_steps=1, max_grad_norm=0.0)
    assert trainer.args.gradient_accumulation_steps == 2
    twin = tiny.build_model(backbones)
    seen = []
    loss_of = trainer._loss
    trainer._loss = lambda model, inputs, items: seen.append((inputs, items)) or loss_of(model, inputs, items)
    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()

    trainer.add_callback(Keep())
    trainer.train()
    (word, items), (long, same) = seen
    assert items == same == 3 + 2 * 2  # answers of the step, not tokens
    m = draw_from(trainer.args.elastic_shares("long"), 0, 0, 2)
    assert long["num_visual_tokens"].unflatten(0, (2, 2))[:, 0].tolist() == [m, m]
    assert m in (6, 7, 8, 12)
    assert {*word["num_visual_tokens"].tolist()} <= set(range(2, 10))
    assert {*long["num_visual_tokens"].unflatten(0, (2, 2))[:, 1].tolist()} <= {1, 3}

    twin.train()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trainer.trainable_names)
    total = 0.0
    for batch in (word, long):
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "answer_logits_only")}
        logits = twin(**inputs).logits
        for row in range(len(labels)):
            places = [p for p in range(1, labels.shape[1]) if labels[row, p] != IGNORED]
            runs = np.split(np.array(places), np.flatnonzero(np.diff(places) != 1) + 1)
            for run in runs:
                total = total + F.cross_entropy(logits[row, run - 1], labels[row, run]) / 7
    total.backward()
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert {"loss_word", "loss_long"} <= set(row)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_answers_are_runs_of_labels():
    labels = torch.tensor([[IGNORED, 4, 5, IGNORED, 6, IGNORED], [IGNORED, IGNORED, 7, 8, 9, 3]])
    assert (first_tokens(labels) != IGNORED).nonzero().tolist() == [[0, 1], [0, 4], [1, 2]]
    logits = torch.randn(7, 11)
    losses, answer = answer_losses(logits, labels)
    single = F.cross_entropy(logits, torch.tensor([4, 5, 6, 7, 8, 9, 3]), reduction="none")
    assert answer.tolist() == [0, 0, 1, 2, 2, 2, 2]
    torch.testing.assert_close(losses, torch.stack([single[:2].mean(), single[2], single[3:].mean()]))


def test_the_warm_up_is_for_the_sources_it_names(backbones, processor, tmp_path):
    trainer = trainer_of(
        backbones, processor, tmp_path, elastic_warmup_fraction=1.0, elastic_warmup_minimum=12,
        elastic_warmup_sources=["long"],
    )  # fmt: skip
    drawn: dict[str, set[int]] = {"word": set(), "long": set()}
    draw = trainer.draw
    trainer.draw = lambda count: [m := draw(count), drawn[trainer.source_of_batch()].add(m)][0]
    trainer.train()
    assert drawn["long"] == {12}
    assert max(drawn["word"]) < 12


def test_samples_of_the_sources_named_draw_an_m_each(backbones, processor, tmp_path):
    trainer = trainer_of(backbones, processor, tmp_path, elastic_per_sample_sources=["long"])
    draws: list[tuple] = []
    draw = trainer.draw
    trainer.draw = lambda count: [m := draw(count), draws.append((trainer.source_of_batch(), m))][0]
    trainer.train()
    shares = trainer.args.elastic_shares("long")
    for step, (_, drawn) in enumerate(draws[1::2]):
        again = draw_per_sample(list(shares), 2, step, 0, 0, 1, list(shares.values()))
        assert drawn.tolist() == again.tolist()
    assert [source for source, _ in draws] == ["word", "long"] * 4
    assert all(isinstance(m, int) for source, m in draws if source == "word")


def test_ranges_are_logged_and_evaluated_by_doublings(backbones, processor, tmp_path):
    trainer = trainer_of(
        backbones, processor, tmp_path, batch_groups=None, elastic_by_source=None, elastic_range=[1, 12]
    )
    trainer.eval_dataset = DATA[:2]
    trainer.train()
    named = {name for row in trainer.state.log_history for name in row if name.startswith("loss_m_")}
    assert named <= {"loss_m_1", "loss_m_2_to_3", "loss_m_4_to_7", "loss_m_8_to_15"}
    logged = trainer.evaluate()
    assert {name for name in logged if "loss_m_" in name} == {f"eval_loss_m_{m}" for m in (1, 2, 4, 8, 12)}
    assert logged["eval_loss"] == pytest.approx(logged["eval_loss_m_12"], rel=1e-3)
    assert doublings(list(range(1, 25))) == [1, 2, 4, 8, 16, 24]


class Stop(TrainerCallback):
    """As a kill would: nothing is saved on the way out."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def losses_of(trainer) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]


def test_a_phase_ends_by_its_loss_and_a_resumed_one_at_the_same_step(backbones, processor, tmp_path, capsys):
    common = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "until_loss_steps": 3}
    probe = trainer_of(backbones, processor, tmp_path / "probe", **common)
    probe.train()
    losses = [loss for _, loss in losses_of(probe)]
    means = [sum(losses[end - 3 : end]) / 3 for end in range(3, 10)]
    limit = (min(means[:3]) + min(means[3:5])) / 2  # the loss falls: it is reached in step 6 or 7
    assert means[3] < min(means[:3]) or means[4] < min(means[:3])
    expected = 3 + next(number for number, mean in enumerate(means) if mean < limit)

    whole = trainer_of(backbones, processor, tmp_path / "whole", until_loss=limit, **common)
    whole.train()
    assert whole.state.global_step == expected
    assert whole.until_loss.is_reached
    assert f"this phase ends after {expected} of at most 9 steps" in capsys.readouterr().err
    assert (tmp_path / "whole" / f"checkpoint-{expected}").is_dir()

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        trainer_of(backbones, processor, folder, until_loss=limit, callbacks=[Stop(5)], **common).train()
    resumed = trainer_of(backbones, processor, folder, until_loss=limit, **common)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
    # And from the checkpoint of its last step it takes none.
    again = trainer_of(backbones, processor, folder, until_loss=limit, **common)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == expected


def test_a_phase_whose_loss_stays_high_says_so(backbones, processor, tmp_path, capsys):
    trainer = trainer_of(backbones, processor, tmp_path, until_loss=1e-6, until_loss_steps=2, max_steps=2)
    trainer.train()
    assert not trainer.until_loss.is_reached
    assert "not below until_loss=1e-06, after all 2 steps" in capsys.readouterr().err

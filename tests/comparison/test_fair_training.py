"""Everybody trains on the same conversations, in the same order, for the same counted FLOPs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusedvlm.comparison.conversations import IGNORED, Batches, Stream
from fusedvlm.comparison.equal_training import draw_count
from fusedvlm.comparison.flop_account import FlopAccount
from fusedvlm.quickstart import world


def samples(count: int = 12) -> list[world.Sample]:
    return [world.make_sample(0, index) for index in range(count)]


def test_a_stream_is_the_same_however_it_is_taken():
    in_ones = Stream(samples(), "one_word", seed=3)
    in_fives = Stream(samples(), "one_word", seed=3)
    ones = [in_ones.take(1)[0] for _ in range(10)]
    assert ones == in_fives.take(5) + in_fives.take(5)
    assert ones != Stream(samples(), "one_word", seed=4).take(10)


def test_streams_ask_what_their_name_says_about_the_image_they_name():
    for kind, tasks in (("one_word", {"colour", "shape", "letter"}), ("dense", {"list", "read"})):
        for asked in Stream(samples(), kind, seed=0).take(30):
            assert asked.question.task in tasks
            sample = samples()[asked.image]
            if kind == "dense":
                assert asked.question == sample.dense_question()
            else:
                task, cell = asked.question.text.split(" at ")
                assert sample.cell_question(task, cell) == asked.question


def test_the_drawn_m_depends_on_nothing_but_seed_step_and_group():
    draws = [draw_count((1, 4, 16), 0, step, group, large=True) for step in range(200) for group in range(2)]
    assert draws == [draw_count((1, 4, 16), 0, step, group, large=True) for step in range(200) for group in range(2)]
    assert set(draws) == {1, 4, 16}
    assert np.mean(np.array(draws) == 16) > 0.55  # half the time by rule, a third of the rest by chance
    assert {draw_count((4,), 0, step, 0, large=False) for step in range(5)} == {4}


def test_the_account_counts_each_shape_once_and_every_time():
    layer, account = nn.Linear(8, 4), FlopAccount()

    def step(rows: int):
        return lambda: layer(torch.ones(rows, 8, requires_grad=True)).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step(3)()
    expected = counter.get_total_flops()
    assert expected == 3 * (2 * 3 * 8 * 4)  # forward, and backward for input and weights
    for _ in range(4):
        account.run(("rows", 3), step(3))
    account.run(("rows", 6), step(6))
    assert account.spent == 4 * expected + 2 * expected
    assert len(account.known) == 2


@pytest.mark.parametrize("kind", ["one_word", "dense"])
@pytest.mark.parametrize("connector", ["fused", "dense"])
def test_a_batch_is_what_processor_and_collator_make_of_it(kind, connector, glance):
    from fusedvlm.comparison.entrants import build_model, parse_entrant
    from fusedvlm.trainers import ConversationCollator

    shared, plan = glance
    m = 16 if connector == "dense" else 4
    model, processor = build_model(parse_entrant(connector), shared, plan, (m,), seed=0)
    views = shared.view_tokens(model, "training")
    reads = bool(model.config.fuse_question)
    ours = Batches(shared.tokenizer, views, model.config.image_token_id, torch.device("cpu"), reads)
    asked = Stream(shared.samples, kind, 0).take(5)
    conversations = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question.text}]},
                {"role": "assistant", "content": [{"type": "text", "text": one.question.answer}]},
            ],
            "view_features": views[one.image : one.image + 1].float(),
        }
        for one in asked
    ]
    theirs = ConversationCollator(processor, num_visual_tokens=m)(conversations)
    batch = ours(asked, m)
    for name in ("input_ids", "labels", "attention_mask", "view_features", "image_num_views", "num_visual_tokens"):
        assert torch.equal(batch[name], theirs[name]), name
    if reads:
        for name in ("question_input_ids", "question_lengths"):
            assert torch.equal(batch[name], theirs[name]), name
    model.train()
    assert torch.allclose(model(**batch).loss, model(**theirs).loss)
    assert (batch["labels"] != IGNORED).sum() > 0


def test_cached_view_tokens_are_those_of_the_image_processor(glance):
    from fusedvlm.comparison.entrants import build_model, parse_entrant

    shared, plan = glance
    model, processor = build_model(parse_entrant("fused"), shared, plan, (4,), seed=0)
    cached = shared.view_tokens(model, "held_out")
    from fusedvlm.comparison.shared_world import HELD_OUT

    pixels = processor.image_processor([world.make_sample(0, HELD_OUT + 2).image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        fresh = model.model.get_view_features(pixels)[0]
    assert torch.allclose(cached[2:3].float(), fresh, atol=5e-3)  # half precision on disk

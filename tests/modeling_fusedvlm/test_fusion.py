"""Merge, fusion rows and the three properties that follow from causality."""

import copy

import pytest
import torch

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_rows import build_fusion_plan, build_fusion_rows, query_token_ids
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_views import FusedVLMViewMerger
from fusedvlm.tests import tiny


@pytest.mark.parametrize("side", [6, 7], ids=["even grid", "odd grid"])
def test_merge_against_a_loop_over_windows(side):
    width = 5
    merger = FusedVLMViewMerger(width, merge_views=True, newline_token=True, initializer_range=0.02)
    torch.nn.init.normal_(merger.newline)
    patches = torch.randn(2, side * side, width)
    tokens = merger(patches)
    out = (side + 1) // 2
    assert tokens.shape == (2, out * out + 1, width)
    grid = torch.nn.functional.pad(patches.reshape(2, side, side, width), (0, 0, 1, 1, 1, 1))
    for row in range(out):
        for column in range(out):
            window = grid[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected = torch.einsum("vyxc,dcyx->vd", window, merger.conv.weight) + window[:, 1, 1]
            torch.testing.assert_close(tokens[:, row * out + column], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens[:, -1], merger.newline[0].expand(2, -1))


def test_merge_refuses_a_grid_that_is_not_square():
    merger = FusedVLMViewMerger(5, merge_views=True, newline_token=False, initializer_range=0.02)
    with pytest.raises(ValueError, match="12 patch tokens"):
        merger(torch.randn(1, 12, 5))


def test_query_rows_are_nested_and_end_in_the_eos():
    assert query_token_ids(4, 320, 319, distinct=True) == [320, 321, 322, 319]
    assert query_token_ids(1, 320, 319, distinct=True) == [319]
    assert query_token_ids(3, 320, 319, distinct=False) == [319, 319, 319]


def test_rows_hold_each_part_in_its_place():
    plan = build_fusion_plan(
        3,
        9,
        image_num_views=[2, 1],
        question_lengths=[1, 2, 0],
        question_turns=[0, 1, 0],
        num_visual_tokens=[2, 1, 3],
        image_num_questions=[2, 1],
        sample_num_images=[1, 1],
    )
    views = torch.arange(3 * 4).float().reshape(3, 4, 1) + 100
    text = [torch.full((3, 1), 1.0), torch.full((3, 1), 2.0), torch.full((3, 1), 3.0)]
    rows = build_fusion_rows(views, text, plan, keep_questions=True)
    expected = [*range(100, 108), 1, 1, 1, 2, 2, 2]
    assert rows.embeds[0, :, 0].tolist() == expected
    assert rows.embeds[1, :, 0].tolist() == [*range(108, 112), 3, 3, 3, *[0] * 7]
    assert rows.attention_mask.sum(-1).tolist() == [14, 7]
    assert rows.spans == [(0, 9, 11), (0, 13, 14), (1, 4, 7)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_num_views": [2, 2]}, "adds up to 4, but the batch has 3 views"),
        ({"image_num_views": [3], "sample_num_images": [2]}, "adds up to 2, but the batch has 1 images"),
        ({"question_lengths": [1]}, "question_lengths has 1 entries for 3 questions"),
        ({"image_num_questions": [1]}, "1 entries for 3 images"),
        ({"num_visual_tokens": [1, 2]}, "num_visual_tokens has 2 entries for 3 questions"),
    ],
)
def test_counts_that_disagree_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_fusion_plan(3, 9, **kwargs)


def test_language_order_is_sample_turn_image():
    plan = build_fusion_plan(
        3,
        9,
        image_num_questions=[2, 1, 1],
        question_turns=[0, 1, 1, 0],
        sample_num_images=[2, 1],
    )
    assert plan.language_order() == [0, 1, 2, 3]
    swapped = build_fusion_plan(2, 9, image_num_questions=[2, 2], question_turns=[0, 1, 0, 1], sample_num_images=[2])
    assert swapped.language_order() == [0, 2, 1, 3]
    assert swapped.visual_tokens_per_sample() == [36]


@pytest.fixture(scope="module")
def views(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.model.get_view_features(torch.randn(3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))[0]


def fuse(model, views, questions, counts):
    ids = [token for question in questions for token in question]
    fused, _ = model.model.fuse(
        view_features=views,
        image_num_views=[len(views)],
        question_input_ids=torch.tensor(ids, dtype=torch.long),
        question_lengths=[len(question) for question in questions],
        num_visual_tokens=counts,
        image_num_questions=[len(questions)],
    )
    return fused.segment_states


QUESTIONS = [[5, 17, 40], [8, 9], [100, 3, 7, 77]]


@torch.no_grad()
def test_queries_are_nested(model, views):
    largest = fuse(model, views, QUESTIONS[:1], [12])[0]
    for m in (1, 2, 7, 11):
        states = fuse(model, views, QUESTIONS[:1], [m])[0]
        torch.testing.assert_close(states[:-1], largest[: m - 1], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def packed(backbones):
    """As published: a question stands on the row behind those before it."""
    return tiny.build_model(backbones, fusion_row_per_turn=False)


@torch.no_grad()
def test_later_questions_do_not_change_earlier_states(packed, views):
    alone = fuse(packed, views, QUESTIONS[:1], [7])
    together = fuse(packed, views, QUESTIONS, [7, 3, 2])
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)
    other_first = fuse(packed, views, [[1, 2, 3], *QUESTIONS[1:]], [7, 3, 2])
    assert (other_first[1] - together[1]).abs().max() > 1e-3  # but an earlier question does change later ones


@torch.no_grad()
def test_incremental_fusion_equals_one_pass(packed, views):
    whole = fuse(packed, views, QUESTIONS, [7, 3, 2])
    cache = packed.model.start_fusion(views)
    assert cache.get_seq_length() == views.shape[0] * views.shape[1]
    untouched = copy.deepcopy(cache)
    for question, count, expected in zip(QUESTIONS, [7, 3, 2], whole, strict=True):
        states = packed.model.continue_fusion(cache, torch.tensor(question), count)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    # The same cached image serves another user's first question.
    again = packed.model.continue_fusion(untouched, torch.tensor([9, 9]), 4)
    torch.testing.assert_close(again, fuse(packed, views, [[9, 9]], [4])[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_question_changes_the_states_unless_it_is_not_fused(model, views, backbones):
    one, other = fuse(model, views, [[5, 17]], [4])[0], fuse(model, views, [[6, 18]], [4])[0]
    assert (one - other).abs().max() > 1e-3
    agnostic = tiny.build_model(backbones, fuse_question=False)
    one, other = fuse(agnostic, views, [[5, 17]], [4])[0], fuse(agnostic, views, [[6, 18]], [4])[0]
    assert torch.equal(one, other)


@pytest.mark.parametrize("count", [0, 13, -1])
def test_counts_out_of_range_name_the_range(model, views, count):
    with pytest.raises(ValueError, match=rf"num_visual_tokens={count} is out of range: .* 1 to 12"):
        fuse(model, views, QUESTIONS[:1], [count])

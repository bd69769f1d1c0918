"""All m in one pass equal one pass per m, for every row layout, attention and connector; caches of several images too."""

import copy

import pytest
import torch

from fusedvlm.modeling_fusedvlm import modeling_fusedvlm_counts as counts_module, modeling_fusedvlm_turns as turns
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_rows import bucket_rows, build_fusion_plan
from fusedvlm.tests import tiny

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
COUNTS = [12, 1, 7, 2, 7]
VIEWS = [3, 1, 2]
QUESTIONS = [[5, 17, 40], [8, 9], [100, 3, 7, 77], [4]]  # two about image 0, one each about the others
ASKED = [2, 1, 1]


@pytest.fixture(scope="module")
def views():
    return torch.randn(sum(VIEWS), 10, tiny.WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def packed(model):
    twin = copy.deepcopy(model)
    twin.config.fusion_row_per_turn = False
    return twin


def questions(asked=QUESTIONS, images=ASKED):
    return {
        "image_num_views": VIEWS,
        "question_input_ids": torch.tensor([token for question in asked for token in question]),
        "question_lengths": [len(question) for question in asked],
        "image_num_questions": images,
    }


def one_by_one(model, views):
    """The naive twin: one `fuse` and projection per question and m, each question the first about its image."""
    per_image, found = views.split(VIEWS), []
    for question, image in zip(QUESTIONS, [0, 0, 1, 2], strict=True):
        row = []
        for m in COUNTS:
            fused, _ = model.model.fuse(
                view_features=per_image[image],
                image_num_views=[VIEWS[image]],
                question_input_ids=torch.tensor(question),
                question_lengths=[len(question)],
                num_visual_tokens=m,
            )
            row.append(model.model.connector.project(fused.segment_states[0]))
        found.append(row)
    return found


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for m, tokens, wanted in zip(COUNTS, one, other, strict=True):
            assert tokens.shape == (m, tiny.LLM_WIDTH)
            torch.testing.assert_close(tokens, wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["a row per turn", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "without masks"])
def test_all_m_in_one_pass_equal_one_pass_per_m(model, packed, views, layout, attention, monkeypatch):
    model = packed if layout == "packed" else model
    expected = one_by_one(model, views)
    if attention == "without masks":
        monkeypatch.setattr(turns, "MASK_FORMS", {})
        monkeypatch.setattr(counts_module, "MASK_FORMS", {})
    else:
        monkeypatch.setattr(model.model.fuser.config, "_attn_implementation", attention)
    found, plan = model.model.fuse_every_count(COUNTS, view_features=views, **questions())
    assert_equal(found, expected)
    assert [segment.image for segment in plan.segments] == [0, 0, 1, 2]


@torch.no_grad()
def test_all_m_without_a_question(backbones, views):
    model = tiny.build_model(backbones, fuse_question=False)
    found, _ = model.model.fuse_every_count([5, 1], view_features=views, image_num_views=VIEWS)
    for count, tokens in zip([5, 1], found[1], strict=True):
        fused, _ = model.model.fuse(view_features=views, image_num_views=VIEWS, num_visual_tokens=count)
        torch.testing.assert_close(tokens, model.model.connector.project(fused.segment_states[1]), **CLOSE)


@pytest.mark.parametrize("takes_mask", [True, False], ids=["mask", "no mask"])
def test_gradients_of_all_m_equal_those_of_one_pass_per_m(backbones, views, monkeypatch, takes_mask):
    model = tiny.build_model(backbones).train()
    weights = [torch.randn(m, tiny.LLM_WIDTH, generator=torch.Generator().manual_seed(m)) for m in COUNTS]

    def gradients(found):
        model.zero_grad()
        sum((tokens * weight).sum() for row in found for tokens, weight in zip(row, weights, strict=True)).backward()
        trained = [*model.model.fuser.named_parameters(), *model.model.projector.named_parameters()]
        return {name: parameter.grad.clone() for name, parameter in trained}

    expected = gradients(one_by_one(model, views))
    if not takes_mask:
        monkeypatch.setattr(turns, "MASK_FORMS", {})
        monkeypatch.setattr(counts_module, "MASK_FORMS", {})
    plain = gradients(model.model.fuse_every_count(COUNTS, view_features=views, **questions())[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saving = gradients(model.model.fuse_every_count(COUNTS, view_features=views, **questions())[0])
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        scale = float(gradient.abs().max())
        torch.testing.assert_close(plain[name], gradient, atol=1e-5 * scale + 1e-5, rtol=1e-4)
        torch.testing.assert_close(saving[name], gradient, atol=1e-5 * scale + 1e-5, rtol=1e-4)


@torch.no_grad()
def test_features_of_all_m_are_those_of_one_m_each(model):
    pixels = torch.randn(4, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    asked = {
        "image_num_views": [3, 1],
        "question_input_ids": torch.tensor([5, 17, 8]),
        "question_lengths": [2, 1],
    }
    features = model.get_image_features_every_count([7, 2], pixel_values=pixels, **asked)
    assert list(features) == [7, 2]
    for m, own in features.items():
        expected = model.get_image_features(pixel_values=pixels, num_visual_tokens=m, return_dict=True, **asked)
        assert own.visual_tokens_per_sample == expected.visual_tokens_per_sample
        for tokens, wanted in zip(own.pooler_output, expected.pooler_output, strict=True):
            torch.testing.assert_close(tokens, wanted, **CLOSE)


@torch.no_grad()
def test_later_turns_get_the_same_m_on_rows_of_their_own_and_are_refused_on_packed_ones(model, packed, views):
    asked = {**questions(), "view_features": views, "sample_num_images": [2, 1]}
    features = model.get_image_features_every_count([3], **asked)[3]
    expected = model.get_image_features(num_visual_tokens=3, return_dict=True, **asked)
    for tokens, wanted in zip(features.pooler_output, expected.pooler_output, strict=True):
        torch.testing.assert_close(tokens, wanted, **CLOSE)
    with pytest.raises(ValueError, match="a second question reads the first one"):
        packed.get_image_features_every_count([3], **asked)


@torch.no_grad()
def test_other_connectors_give_what_they_give_one_by_one(tmp_path):
    model = tiny.build_model(tmp_path, connector="pool", fuser_config=None, num_visual_tokens=9,
                             num_followup_visual_tokens=None, trained_num_visual_tokens=[1, 9])  # fmt: skip
    pixels = torch.randn(3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    found, _ = model.model.fuse_every_count([9, 1], pixel_values=pixels, image_num_views=[2, 1])
    for number, count in enumerate([9, 1]):
        fused, _ = model.model.fuse(pixel_values=pixels, image_num_views=[2, 1], num_visual_tokens=count)
        for row, wanted in zip(found, fused.segment_states, strict=True):
            assert torch.equal(row[number], wanted)
    with pytest.raises(ValueError, match="num_visual_tokens=2 cannot be given: the pool connector"):
        model.model.fuse_every_count([9, 2], pixel_values=pixels, image_num_views=[2, 1])


@pytest.mark.parametrize(
    ("counts", "extra", "message"),
    [
        ([], {}, "counts is empty"),
        ([1.5], {}, r"counts=\[1.5\] must be whole numbers"),
        ([13], {}, "num_visual_tokens=13 is out of range"),
        ([3], {"num_visual_tokens": 4}, "leave num_visual_tokens out"),
    ],
)
def test_counts_that_cannot_be_given_are_refused(model, views, counts, extra, message):
    with pytest.raises(ValueError, match=message):
        model.model.fuse_every_count(counts, view_features=views, **questions(), **extra)


# -- several images at once --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", ["a row per turn", "packed"])
def test_several_images_are_read_and_asked_at_once(model, packed, layout):
    model = packed if layout == "packed" else model
    counts = [2, 1, 2]
    views = torch.randn(5, 10, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
    together, alone = (
        model.model.start_fusions(views, counts),
        [model.model.start_fusion(v) for v in views.split(counts)],
    )
    for cache in together:  # each can be dropped by itself
        keys = cache.layers[0].keys
        assert keys.untyped_storage().nbytes() == keys.numel() * keys.element_size()
    for asked, m in (([[5, 17], [8], [4, 9, 3]], [7, 2, 1]), ([[6], [7, 7], [2]], [3, 3, 12])):
        lengths = [len(question) for question in asked]
        flat = torch.tensor([token for question in asked for token in question])
        states = model.model.continue_fusions(together, flat, lengths, m)
        for cache, question, count, found in zip(alone, asked, m, states, strict=True):
            expected = model.model.continue_fusion(cache, torch.tensor(question), count)
            torch.testing.assert_close(found, expected, **CLOSE)
    assert [cache.get_seq_length() for cache in together] == [cache.get_seq_length() for cache in alone]


@torch.no_grad()
def test_another_first_question_needs_no_copy_of_a_packed_cache(packed, views):
    cache = packed.model.start_fusion(views[:3])
    first = packed.model.continue_fusion(cache, torch.tensor([5, 17]), 7, extend=False)
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(packed.model.continue_fusion(cache, torch.tensor([5, 17]), 7), first, **CLOSE)
    assert cache.get_seq_length() == 30 + 2 + 7


def test_a_row_of_its_own_is_not_extended(model, views):
    cache = model.model.start_fusion(views[:3])
    with pytest.raises(ValueError, match="leave extend out"):
        model.model.continue_fusion(cache, torch.tensor([5]), 7, extend=True)
    with pytest.raises(ValueError, match="at least one image"):
        model.model.continue_fusions([], None, None, 7)


# -- rows of unlike lengths --------------------------------------------------------------------------------------------


def test_rows_of_one_bucket_have_nearly_the_same_length():
    assert bucket_rows([1500, 300, 310, 305]) == [[0], [2, 3, 1]]
    assert bucket_rows([5, 40, 33]) == [[1, 2, 0]]  # a pass of its own costs more than 42 tokens of padding
    lengths = torch.randint(200, 2000, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    buckets = bucket_rows(lengths)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(64))
    for bucket in buckets:
        held = [lengths[row] for row in bucket]
        assert max(held) * len(held) <= 1.1 * sum(held) + 1
    assert len(buckets) < 20


@torch.no_grad()
@pytest.mark.parametrize("layout", ["a row per turn", "packed"])
def test_buckets_give_what_one_padded_pass_gives(model, packed, views, layout, monkeypatch):
    model = packed if layout == "packed" else model
    rows = "fusedvlm.modeling_fusedvlm.modeling_fusedvlm_rows"
    calls = []
    hook = model.model.fuser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        found = model.model.fuse(view_features=views, num_visual_tokens=[7, 3, 12, 2], **questions())[0].segment_states
        padded, calls[:] = len(calls), []
        monkeypatch.setattr(f"{rows}.BUCKET_TOKENS", 0)
        apart = model.model.fuse(view_features=views, num_visual_tokens=[7, 3, 12, 2], **questions())[0].segment_states
        assert len(calls) > padded
        calls[:] = []
        monkeypatch.setattr(f"{rows}._has_company", lambda: True)  # sharded weights: all ranks call equally often
        model.model.fuse(view_features=views, num_visual_tokens=[7, 3, 12, 2], **questions())
        assert len(calls) == padded
    finally:
        hook.remove()
    for one, other in zip(found, apart, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_the_plan_of_some_images_keeps_their_segments_in_order():
    plan = build_fusion_plan(6, 9, VIEWS, [1, 2, 3, 4], None, [7, 3, 12, 2], [2, 1, 1])
    part, chosen = plan.of_images([0, 2])
    assert chosen == [0, 1, 3]
    assert part.views_per_image == [3, 2]
    assert [(segment.image, segment.num_question_tokens, segment.num_visual_tokens) for segment in part.segments] == [
        (0, 1, 7),
        (0, 2, 3),
        (1, 4, 2),
    ]

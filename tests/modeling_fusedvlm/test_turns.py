"""A fusion row per turn: all ways to compute it are one row for each question, and no turn sees another."""

import copy
import itertools
import json
import threading

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from fusedvlm.costs.variant_info import describe_variant, render_info
from fusedvlm.modeling_fusedvlm import (
    FusedVLMConfig,
    FusedVLMForConditionalGeneration,
    modeling_fusedvlm_turns as turns,
)
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_integrity import RECORD_KEY
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_rows import build_fusion_plan
from fusedvlm.tests import tiny

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Two images of unequal views in one conversation, one in another: (image, turn, question, m).
VIEWS = [3, 1, 2]
ASKED = [
    (0, 0, [5, 17, 40], 7),
    (0, 1, [8, 9], 3),
    (0, 2, [100, 3, 7, 77], 2),
    (1, 1, [8, 9], 7),
    (1, 2, [100, 3, 7, 77], 1),
    (2, 0, [4], 12),
]


@pytest.fixture(scope="module")
def views():
    return torch.randn(sum(VIEWS), 10, tiny.WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def agnostic(backbones):
    return tiny.build_model(backbones, fuse_question=False)


def fuse(model, views, asked=ASKED):
    """States of every segment, in one batch."""
    fused, _ = model.model.fuse(
        view_features=views,
        image_num_views=VIEWS,
        question_input_ids=torch.tensor([token for _, _, question, _ in asked for token in question]),
        question_lengths=[len(question) for _, _, question, _ in asked],
        question_turns=[turn for _, turn, _, _ in asked],
        num_visual_tokens=[m for *_, m in asked],
        image_num_questions=[sum(image == number for image, *_ in asked) for number in range(len(VIEWS))],
        sample_num_images=[2, 1],
    )
    return fused.segment_states


def alone(model, views, image, question, m):
    """A row for one question, literally: its image's views, its tokens, its queries and the eos, one after another."""
    fuser, config = model.model.fuser, model.config
    eos, first = config.fuser_config.eos_token_id, config.first_query_token_id
    ids = [*(question if config.fuse_question else []), *range(first, first + m - 1), eos]
    row = torch.cat([views.split(VIEWS)[image].flatten(0, 1), fuser.embed_tokens(torch.tensor(ids))])
    return fuser(inputs_embeds=row[None], use_cache=False).last_hidden_state[0, -m:]


def assert_alone(model, views, states):
    for (image, _, question, m), found in zip(ASKED, states, strict=True):
        torch.testing.assert_close(found, alone(model, views, image, question, m), **CLOSE)


@pytest.fixture
def attention(model):
    """Set the fuser's attention implementation for one test."""
    config = model.model.fuser.config
    before = config._attn_implementation
    yield lambda name: setattr(config, "_attn_implementation", name)
    config._attn_implementation = before


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_every_turn_equals_a_row_of_its_own(model, views, attention, backend):
    attention(backend)
    assert_alone(model, views, fuse(model, views))


@torch.no_grad()
def test_every_turn_without_a_question_equals_a_row_of_its_own(agnostic, views):
    states = fuse(agnostic, views)
    assert_alone(agnostic, views, states)
    torch.testing.assert_close(states[1][:2], states[0][:2], **CLOSE)  # nothing but m tells turns apart


@torch.no_grad()
def test_ways_without_masks_equal_the_masked_ones(model, views, monkeypatch):
    expected = fuse(model, views)
    monkeypatch.setattr(turns, "MASK_FORMS", {})
    assert_alone(model, views, fuse(model, views))
    monkeypatch.setattr(model.model.fuser, "gradient_checkpointing", True)
    model.model.fuser.train()
    try:
        repeated = fuse(model, views)
    finally:
        model.model.fuser.eval()
    for found, wanted in zip(repeated, expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("takes_mask", [True, False], ids=["mask", "no mask"])
def test_gradients_agree_with_and_without_checkpointing(backbones, views, monkeypatch, takes_mask):
    model = tiny.build_model(backbones).train()
    if not takes_mask:
        monkeypatch.setattr(turns, "MASK_FORMS", {})
    weights = [torch.randn(m, tiny.WIDTH, generator=torch.Generator().manual_seed(m)) for *_, m in ASKED]

    def gradients(states):
        model.zero_grad()
        sum((state * weight).sum() for state, weight in zip(states, weights, strict=True)).backward()
        return {name: parameter.grad.clone() for name, parameter in model.model.fuser.named_parameters()}

    expected = gradients([alone(model, views, image, question, m) for image, _, question, m in ASKED])
    plain = gradients(fuse(model, views))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(fuse(model, views))
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(plain[name], gradient, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_follow_up_does_not_depend_on_the_turns_before_it(model, views):
    together = fuse(model, views)
    others = [
        [(0, 0, [200, 201, 202, 203, 204], 12), *ASKED[1:]],  # another first question, at another m
        ASKED[1:],  # none before
        [ASKED[2], ASKED[1], ASKED[0], *ASKED[3:]],  # another order
    ]
    for asked in others:
        for segment, states in zip(asked, fuse(model, views, asked), strict=True):
            if segment in ASKED:
                torch.testing.assert_close(states, together[ASKED.index(segment)], **CLOSE)


@torch.no_grad()
def test_a_shared_prefix_answers_every_question_and_stays_as_it_is(model, views):
    whole, first_image = fuse(model, views), views[: VIEWS[0]]
    cache = model.model.start_fusion(first_image)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for order in itertools.permutations(range(3)):
        for number in order:
            _, _, question, m = ASKED[number]
            states = model.model.continue_fusion(cache, torch.tensor(question), m)
            torch.testing.assert_close(states, whole[number], **CLOSE)
    assert cache.get_seq_length() == first_image.shape[0] * first_image.shape[1]
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_one_prefix_serves_many_threads(model, views):
    whole, cache = fuse(model, views), model.model.start_fusion(views[: VIEWS[0]])
    found = {}

    def ask(number):
        _, _, question, m = ASKED[number % 3]
        found[number] = model.model.continue_fusion(cache, torch.tensor(question), m)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        torch.testing.assert_close(found[number], whole[number % 3], **CLOSE)


@torch.no_grad()
def test_a_single_turn_is_the_same_on_either_row(model, views):
    asked = [ASKED[0], ASKED[3], ASKED[5]]
    own = fuse(model, views, asked)
    packed_model = copy.deepcopy(model)
    packed_model.config.fusion_row_per_turn = False
    for found, expected in zip(own, fuse(packed_model, views, asked), strict=True):
        assert torch.equal(found, expected)


def test_a_turn_sees_its_views_and_what_it_said_so_far():
    plan = build_fusion_plan(
        3,
        9,
        image_num_views=[2, 1],
        question_lengths=[1, 2, 0],
        num_visual_tokens=[2, 1, 3],
        image_num_questions=[2, 1],
    )
    views = torch.arange(3 * 2).float().reshape(3, 2, 1)
    text = [torch.full((3, 1), 1.0), torch.full((3, 1), 2.0), torch.full((3, 1), 3.0)]
    rows = turns.build_turn_rows(views, text, plan, keep_questions=True)
    assert rows.texts[..., 0].tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[4, 5, 6, 4, 5, 6], [2, 3, 4, 2, 2, 2]]
    assert rows.is_view.tolist() == [[True] * 4, [True, True, False, False]]
    assert rows.spans == [(0, 1, 3), (0, 5, 6), (1, 0, 3)]
    for image, turn_of in enumerate([[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]]):
        for query in range(6):
            expected = [*rows.is_view[image].tolist()]
            expected += [turn_of[key] == turn_of[query] and key <= query for key in range(6)]
            assert rows.visible[image, query].tolist() == expected


CONVERSATION = [
    tiny.user(tiny.picture(0), text="what is in the image?"),
    tiny.assistant("a red cat"),
    tiny.user(tiny.picture(1, 30, 60), text="same?"),
    tiny.assistant("no, a dog"),
    tiny.user(text="how many?"),
]
OTHER_START = [
    tiny.user(tiny.picture(0), text="describe the picture in detail, please."),
    tiny.assistant("objects"),
]
MIXED = [
    CONVERSATION,
    [tiny.user(text="hello")],
    [*OTHER_START, *CONVERSATION[2:]],
    [tiny.user(tiny.picture(3), tiny.picture(4, 40, 40), text="same?")],
]


def encode(processor, conversations, **kwargs):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, **kwargs},
    )


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5, 12])
def test_conversations_in_a_batch_have_the_visual_tokens_they_have_alone(model, processor, count):
    packed = encode(processor, MIXED, num_visual_tokens=count)
    packed = {name: values for name, values in packed.items() if name not in ("input_ids", "attention_mask")}
    batch = model.get_image_features(**packed).pooler_output
    alone = []
    for conversation in (MIXED[0], MIXED[2], MIXED[3]):
        inputs = encode(processor, [conversation], num_visual_tokens=count)
        inputs = {name: values for name, values in inputs.items() if name not in ("input_ids", "attention_mask")}
        alone += model.get_image_features(**inputs).pooler_output
    for found, expected in zip(batch, alone, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    # Two conversations that began with other questions: from the second turn on they have the same tokens.
    followup = min(3, count)
    torch.testing.assert_close(alone[0][-followup * 2 :], alone[1][-followup * 2 :], **CLOSE)
    torch.testing.assert_close(alone[0][count:], alone[1][count:], **CLOSE)
    assert (alone[0][:count] - alone[1][:count]).abs().max() > 1e-3


def test_a_mixed_batch_of_turns_generates_what_each_does_alone(model, processor):
    def new(conversations):
        inputs = encode(processor, conversations)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return [[token for token in row if token != processor.tokenizer.pad_token_id] for row in out.tolist()]

    assert new(MIXED) == [row for conversation in MIXED for row in new([conversation])]


# -- the field ---------------------------------------------------------------------------------------------------------


def test_new_models_have_it_and_every_file_says_so(model, variant):
    assert model.config.fusion_row_per_turn is True
    assert json.loads((variant / "config.json").read_text())["fusion_row_per_turn"] is True
    with safe_open(variant / "model.safetensors", framework="pt") as weights:
        assert json.loads(weights.metadata()[RECORD_KEY])["fusion_row_per_turn"] is True


def without_field(folder, target):
    """A variant as it was written before the field, in its configuration and in the record of its weights."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["fusion_row_per_turn"]
    (target / "config.json").write_text(json.dumps(config))
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        metadata = dict(weights.metadata())
    record = json.loads(metadata[RECORD_KEY])
    del record["fusion_row_per_turn"]
    save_file(
        load_file(folder / "model.safetensors"),
        target / "model.safetensors",
        {**metadata, RECORD_KEY: json.dumps(record)},
    )
    return target


@torch.no_grad()
def test_a_variant_older_than_the_field_keeps_its_packed_row(variant, tmp_path, views):
    old = FusedVLMForConditionalGeneration.from_pretrained(without_field(variant, tmp_path / "old")).eval()
    assert old.config.fusion_row_per_turn is False
    states = fuse(old, views)
    torch.testing.assert_close(states[0], alone(old, views, 0, ASKED[0][2], 7), **CLOSE)
    assert (states[1] - alone(old, views, 0, ASKED[1][2], 3)).abs().max() > 1e-3
    old.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["fusion_row_per_turn"] is False


def test_weights_older_than_the_field_are_refused_a_row_per_turn(variant, tmp_path):
    folder = without_field(variant, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fusion_row_per_turn": True}))
    with pytest.raises(ValueError, match="fusion_row_per_turn is True, trained with False"):
        FusedVLMForConditionalGeneration.from_pretrained(folder)


def test_turning_it_off_is_refused_by_weights_that_had_it(variant, tmp_path):
    folder = tmp_path / "edited"
    folder.mkdir()
    for file in variant.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fusion_row_per_turn": False}))
    with pytest.raises(ValueError, match="fusion_row_per_turn is False, trained with True"):
        FusedVLMForConditionalGeneration.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).fusion_row_per_turn is False


def test_info_tells_the_rows(variant, model, tmp_path):
    assert describe_variant(str(variant))["fusion_row_per_turn"] is True
    assert "each question on a fusion row of its own" in render_info(str(variant))
    packed = copy.deepcopy(model)
    packed.config.fusion_row_per_turn = False
    packed.save_pretrained(tmp_path)
    assert "row of its own" not in render_info(str(tmp_path))


def test_flops_of_turns_are_those_of_rows_that_share_their_views(model):
    with torch.device("meta"):
        connector = type(model)(model.config).model.connector

    def flops(lengths, counts, own):
        connector.config.fusion_row_per_turn = own
        try:
            return connector.image_flops(3, lengths, counts, 0.5)
        finally:
            connector.config.fusion_row_per_turn = True

    views = flops([], [], own=True)
    turns = [(3, 7), (2, 3), (4, 2)]
    alone = [flops([length], [count], own=True) - views for length, count in turns]
    lengths, counts = zip(*turns, strict=True)
    assert flops(lengths, counts, own=True) == pytest.approx(views + sum(alone))
    assert flops(lengths, counts, own=True) < flops(lengths, counts, own=False)
    assert flops(lengths[:1], counts[:1], own=True) == flops(lengths[:1], counts[:1], own=False)


def test_connectors_that_read_each_turn_by_itself_say_so():
    assert FusedVLMConfig().fusion_row_per_turn is False
    assert FusedVLMConfig(connector="pool", num_visual_tokens=9).fusion_row_per_turn is True
    with pytest.raises(ValueError, match="pool connector reads every turn by itself"):
        FusedVLMConfig(connector="pool", num_visual_tokens=9, fusion_row_per_turn=False)

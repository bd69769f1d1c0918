"""Between the fusion states and the answer: the projection, beams, what may be generated, and which token a label is for."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMModel
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm import FusedVLMImageFeatures, labeled_states
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_placeholders import (
    SuppressingLogitsProcessorList,
    repeat_features,
    scatter_visual_tokens,
)
from fusedvlm.tests import tiny
from fusedvlm.trainers import ConversationCollator

SAMPLES = [
    {
        "images": [tiny.picture(1)],
        "messages": [
            {"role": "user", "content": "what?"},
            {"role": "assistant", "content": "a red cat"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes"},
        ],
    },
    {"images": [], "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]},
]


# -- the projection ----------------------------------------------------------------------------------------------------


def test_visual_tokens_are_the_fusion_states_through_one_linear_map(model, processor):
    inputs = processor(images=[tiny.picture(0), tiny.picture(1)], text=["<image> one?", "<image> two?"], padding=True)
    names = [name for name in inputs if name not in ("input_ids", "attention_mask")]
    packed = {name: torch.as_tensor(inputs[name]) for name in names if name != "pixel_values"}
    packed["pixel_values"] = torch.stack([torch.as_tensor(view) for view in inputs["pixel_values"]])
    with torch.no_grad():
        states = model.model.fuse(**packed)[0].segment_states
        tokens = model.get_image_features(**packed, return_dict=True).pooler_output
    weight = model.model.projector.weight
    for projected, segment in zip(tokens, states, strict=True):
        naive = torch.stack([(weight * state).sum(-1) for state in segment])
        torch.testing.assert_close(projected, naive, rtol=1e-5, atol=1e-5)


def test_a_new_projection_is_as_small_as_published():
    """N(0, 0.001^2): visual tokens start far below the LLM's own embeddings and grow from there."""
    assert FusedVLMConfig().projector_initializer_range == 0.001
    small = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    config = FusedVLMConfig(
        vision_config={"hidden_size": 64, "image_size": 8, "patch_size": 4, **small},
        fuser_config={"hidden_size": 64, **small},
        text_config={"hidden_size": 96, "vocab_size": 40, "num_key_value_heads": 2, **small},
    )
    torch.manual_seed(0)
    weight = FusedVLMModel(config).projector.weight
    assert tuple(weight.shape) == (96, 64)
    # 6,144 draws: the deviation of the estimate is 0.9 %, so a tenth is eleven of them.
    assert weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert abs(weight.mean().item()) < 0.0001


# -- beams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [2, 3])
def test_every_beam_of_a_prompt_gets_its_own_image(beams):
    """Prompts A and B with k beams stand as A, A, .., B, B, ..; so must their visual tokens."""
    counts = [2, 1, 3]
    tokens = [torch.arange(1.0, count + 1)[:, None] + 10 * sample for sample, count in enumerate(counts)]
    rows = [sample for sample in range(len(counts)) for _ in range(beams)]
    mask = torch.zeros(len(rows), 4, dtype=torch.bool)
    for row, sample in enumerate(rows):
        mask[row, : counts[sample]] = True
    once = FusedVLMImageFeatures(pooler_output=tokens, visual_tokens_per_sample=counts)
    repeated = repeat_features(once, beams)
    merged = scatter_visual_tokens(
        torch.zeros(len(rows), 4, 1), mask, repeated.pooler_output, repeated.visual_tokens_per_sample
    )
    assert (once.pooler_output, once.visual_tokens_per_sample) == (tokens, counts)
    for row, sample in enumerate(rows):
        assert merged[row][mask[row]].squeeze(-1).tolist() == tokens[sample].squeeze(-1).tolist(), (row, sample)


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_of_a_batch_answer_as_beams_of_one_prompt(model, processor, beams):
    prompts = [[tiny.user(tiny.picture(k, 40 + 9 * k, 30), text=f"question {k}?")] for k in range(3)]

    def answers(messages):
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        settings = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 6, "do_sample": False}
        rows = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        return [processor.decode(row, skip_special_tokens=True) for row in rows]

    together = answers(prompts)
    alone = [answer for prompt in prompts for answer in answers([prompt])]
    assert together == alone
    assert len(set(together)) > beams  # the three prompts do not all say the same


# -- what may be generated ---------------------------------------------------------------------------------------------


@pytest.fixture
def longing(variant):
    """The saved variant, loaded again, with a head that wants nothing but the placeholder."""
    model = AutoModelForImageTextToText.from_pretrained(variant).eval()
    with torch.no_grad():
        bias = model.model.language_model.norm.weight
        model.lm_head.weight.zero_()
        model.lm_head.weight[model.config.image_token_id] = bias
    return model


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_a_placeholder_is_never_generated(longing, processor, settings):
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.picture(0), text="what?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        scores = longing(**inputs).logits[0, -1]
    if scores.argmax() != longing.config.image_token_id:  # the state may lie on the other side of the row
        longing.lm_head.weight.data.neg_()
        scores = longing(**inputs).logits[0, -1]
    assert scores.argmax() == longing.config.image_token_id, "the test must tempt the model"
    torch.manual_seed(0)
    output = longing.generate(**inputs, max_new_tokens=4, **settings)
    assert longing.config.image_token_id not in output[0, inputs["input_ids"].shape[1] :]


def test_a_model_that_was_never_saved_suppresses_the_placeholder(model):
    """Built from a configuration alone, as at the beginning of training from nothing."""
    fresh = type(model)(model.config)
    assert fresh.generation_config.suppress_tokens == [model.config.image_token_id]


def test_settings_that_forget_the_placeholder_are_completed(variant, tmp_path):
    """A folder whose generation settings name other tokens, or none, still suppresses the placeholder."""
    import json
    import shutil

    folder = shutil.copytree(variant, tmp_path / "copy")
    path = folder / "generation_config.json"
    for tokens in (None, [], [5, 9]):
        settings = json.loads(path.read_text()) if path.exists() else {}
        settings["suppress_tokens"] = tokens
        path.write_text(json.dumps(settings))
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert model.generation_config.suppress_tokens == sorted({*(tokens or []), model.config.image_token_id})


# -- labels ------------------------------------------------------------------------------------------------------------


def naive_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Every label is predicted by the logits one place before it; the mean over all of them."""
    losses = []
    for row in range(labels.shape[0]):
        for place in range(1, labels.shape[1]):
            if labels[row, place] != -100:
                losses.append(-F.log_softmax(logits[row, place - 1].double(), -1)[labels[row, place]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("answer_logits_only", [False, True])
def test_the_loss_is_that_of_the_next_token(model, processor, answer_logits_only):
    batch = ConversationCollator(processor)(SAMPLES)
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        loss = model(**batch, answer_logits_only=answer_logits_only).loss
    expected = naive_loss(logits, batch["labels"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # The same labels read one place further would be another number, so the shift is seen.
    assert abs(naive_loss(logits, batch["labels"].roll(1, -1)) - expected) > 0.01


def test_answers_alone_need_labels_that_say_which_they_are(model, processor):
    batch = ConversationCollator(processor)(SAMPLES)
    del batch["labels"]
    with pytest.raises(ValueError, match="needs labels"):
        model(**batch, answer_logits_only=True)


def test_labeled_states_are_the_ones_in_front_of_their_label():
    states = torch.arange(10.0).reshape(2, 5, 1)
    labels = torch.tensor([[-100, 7, -100, 8, 9], [6, -100, -100, -100, 5]])
    kept, following = labeled_states(states, labels)
    assert kept.squeeze(-1).tolist() == [0, 2, 3, 8]
    assert following.tolist() == [7, 8, 9, 5]  # the 6 in the first place has nothing in front of it


# -- the frozen LLM ----------------------------------------------------------------------------------------------------


def test_a_loaded_llm_is_frozen(variant):
    """A variant refers to its LLM: gradients that reached it would train something that is not saved."""
    loaded = AutoModelForImageTextToText.from_pretrained(variant)
    for name, parameter in loaded.named_parameters():
        is_llm = name.startswith(("model.language_model.", "lm_head."))
        assert parameter.requires_grad is not is_llm, name


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 20}], ids=str)
def test_tokens_are_suppressed_as_transformers_would(model, processor, options, monkeypatch):
    inputs = processor(images=tiny.picture(0), text="<image>what is it?", return_tensors="pt")
    asked = {**inputs, "max_new_tokens": 6, "suppress_tokens": [model.config.image_token_id, 7, 20], **options}
    asked |= {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}

    def generate():
        torch.manual_seed(0)
        return model.generate(**asked)

    found = generate()
    monkeypatch.setattr(type(model), "_get_logits_processor", GenerationMixin._get_logits_processor)
    expected = generate()
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(one, other)
        assert bool(one[:, [model.config.image_token_id, 7, 20]].isinf().all())
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_suppression_looks_at_no_other_token(monkeypatch):
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor([3, 900])])
    own = SuppressingLogitsProcessorList.of(processors, in_place=True)
    monkeypatch.setattr(torch, "isin", lambda *_: pytest.fail("searched the vocabulary"))
    scores = torch.zeros(2, 5)
    assert own(torch.zeros(2, 1, dtype=torch.long), scores) is scores
    assert scores.isinf().nonzero().tolist() == [[0, 3], [1, 3]]
    untouched = LogitsProcessorList()
    assert SuppressingLogitsProcessorList.of(untouched, in_place=True) is untouched

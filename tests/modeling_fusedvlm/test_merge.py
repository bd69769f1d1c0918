"""Placeholders and visual tokens are counted sample by sample."""

import pytest
import torch

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_placeholders import scatter_visual_tokens
from fusedvlm.tests import tiny


def test_each_token_lands_on_its_placeholder():
    embeds = torch.zeros(2, 5, 3)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    tokens = [torch.full((2, 3), 1.0), torch.full((1, 3), 2.0), torch.full((1, 3), 3.0)]
    merged = scatter_visual_tokens(embeds, mask, tokens, [2, 2])
    assert merged[..., 0].tolist() == [[0, 1, 1, 0, 0], [2, 0, 0, 0, 3]]


@pytest.mark.parametrize(
    ("found", "expected", "sample"),
    [([3, 1], [2, 2], 0), ([2, 1], [2, 2], 1), ([1, 2], [2, 2], 0), ([0, 4], [2, 2], 0)],
)
def test_a_mismatch_names_the_sample_even_when_totals_agree(found, expected, sample):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for row, count in enumerate(found):
        mask[row, :count] = True
    tokens = [torch.ones(2, 3), torch.ones(2, 3)]
    message = rf"Sample {sample}: expected {expected[sample]} visual tokens .*, found {found[sample]} placeholders"
    with pytest.raises(ValueError, match=message):
        scatter_visual_tokens(torch.zeros(2, 5, 3), mask, tokens, expected)


def chats(processor, *numbers, **kwargs):
    """One prompt about picture k for every k."""
    messages = [[tiny.user(tiny.picture(k), text="what is it")] for k in numbers]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True, **kwargs}
    )


@pytest.mark.parametrize("order", [(0, 1, 0, 1), (0, 0, 1, 1), (0, 1, 2, 0)])
def test_prompts_that_repeat_do_not_repeat_the_images(order, model, processor):
    """Only a generation multiplies rows; a caller who repeats prompts says which image goes where."""
    inputs, images = chats(processor, *order), chats(processor, 0, 1)
    mixed = {**images, "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with pytest.raises(ValueError, match="4 prompts, but images were given for 2"):
        model(**mixed)
    with pytest.raises(ValueError, match="4 prompts, but images were given for 2"):
        model.generate(**mixed, max_new_tokens=1)
    with pytest.raises(ValueError, match="8 prompts, but images were given for 4"):
        model.generate(**mixed, max_new_tokens=1, num_beams=2)


BEAMS = {
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 1},
}


@pytest.mark.parametrize("kind", BEAMS)
def test_every_beam_sees_the_image_of_its_own_prompt(kind, model, processor):
    """A mixed batch (no image, one, two; short and long) gives what each conversation gives alone, row by row."""
    conversations = [
        [tiny.user(tiny.picture(3), text="what is it?")],
        [tiny.user(text="describe the picture in detail, please. how many?")],
        [tiny.user(tiny.picture(4), tiny.picture(5), text="the same?")],
        [tiny.user(tiny.picture(6), text="red?")],
    ]
    settings = {"max_new_tokens": 5, "do_sample": False, **BEAMS[kind]}

    def answers(messages):
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        tokens = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        rows = [processor.decode(row, skip_special_tokens=True) for row in tokens]
        copies = settings.get("num_return_sequences", 1)
        return [rows[start : start + copies] for start in range(0, len(rows), copies)]

    alone = [answers([messages])[0] for messages in conversations]
    assert answers(conversations) == alone
    assert answers(conversations[::-1]) == alone[::-1]
    assert len({tuple(rows) for rows in alone}) == 4


def test_features_that_are_used_twice_are_not_changed(model, processor):
    inputs = chats(processor, 0, 1)
    images = {name: inputs.pop(name) for name in list(inputs) if name not in ("input_ids", "attention_mask")}
    features = model.get_image_features(**images, return_dict=True)
    first, second = (
        model.generate(**inputs, mm_encoder_outputs={"image": features}, num_beams=3, max_new_tokens=4).tolist()
        for _ in range(2)
    )
    assert first == second
    assert len(features.pooler_output) == len(features.visual_tokens_per_sample) == 2


def test_embedded_placeholders_without_images_are_refused(model, processor):
    inputs = chats(processor, 0)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for kwargs in ({"inputs_embeds": embeds}, {"input_ids": torch.tensor([[model.config.image_token_id]])}):
        with pytest.raises((ValueError, RuntimeError), match="no images were given"):
            model(**kwargs)
    text = model.get_input_embeddings()(torch.tensor([[1, 20, 21]]))
    model(inputs_embeds=text)


def test_a_question_conditioned_variant_refuses_to_run_without_questions(model, processor):
    """As a server does that knows a vision part by its pixels alone."""
    inputs = chats(processor, 0)
    without = {name: value for name, value in inputs.items() if not name.startswith("question")}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="fuse_question=True"):
            call(**without)
    with pytest.raises(ValueError, match="fuse_question=True") as error:
        model.get_image_features(pixel_values=inputs["pixel_values"], num_image_patches=torch.tensor([3]))
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("value", [True, 2.5, [2.5], torch.tensor([2.5])])
def test_counts_given_to_the_model_are_whole_numbers(value, model, processor):
    inputs = chats(processor, 0)
    inputs["num_visual_tokens"] = value
    with pytest.raises(ValueError, match="whole numbers"):
        model(**inputs)


def test_model_refuses_a_batch_whose_counts_differ(model, processor):
    messages = [[tiny.user(tiny.picture(k), text="what is it")] for k in range(2)]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    inputs["num_visual_tokens"] = torch.tensor([6, 8])  # the total is still right
    with pytest.raises(ValueError, match=r"Sample 0: expected 6 .* found 7"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"Sample 0: expected 6 .* found 7"):
        model.generate(**inputs, max_new_tokens=1)


def test_placeholders_without_images_are_refused(model, processor):
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.picture(0), text="what")], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with pytest.raises((ValueError, RuntimeError), match="no images were given"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

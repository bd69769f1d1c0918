"""The loading-and-asking helper: batches, streams, awkward pictures, damaged folders."""

import json
import shutil

import pytest
from PIL import Image

from fusedvlm.costs.variant_info import describe_variant
from fusedvlm.serving import VisualChat, user_message
from fusedvlm.tests import tiny


@pytest.fixture(scope="module")
def chat(variant):
    return VisualChat(str(variant), device="cpu")


def test_batch_equals_single_questions(chat):
    images = [[tiny.picture(1)], [tiny.picture(2), tiny.picture(3)], []]
    questions = ["what?", "are they the same?", "hello"]
    counts = [1, 12, 5]
    singles = [
        chat.ask(shown, text, count, max_new_tokens=6)
        for shown, text, count in zip(images, questions, counts, strict=True)
    ]
    assert chat.ask_batch(images, questions, counts, max_new_tokens=6) == singles


def test_stream_is_the_reply(chat):
    conversation = [user_message([tiny.picture(1)], "what?"), tiny.assistant("a cat"), user_message([], "sure?")]
    assert (
        "".join(chat.stream(conversation, max_new_tokens=6)).strip()
        == chat.reply_batch([conversation], max_new_tokens=6)[0]
    )


def test_stream_raises_what_generation_raises(chat):
    with pytest.raises(ValueError, match="num_visual_tokens=99"):
        list(chat.stream([user_message([tiny.picture(1)], "what?")], num_visual_tokens=99))
    with pytest.raises(ValueError, match="no_such_option"):
        list(chat.stream([user_message([tiny.picture(1)], "what?")], max_new_tokens=2, no_such_option=1))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 700)])
def test_extreme_shapes_are_answered(chat, size):
    """As the model itself answers what the processor makes of them."""
    image = Image.new("RGB", size, (9, 200, 30))
    inputs = chat.processor.apply_chat_template(
        [user_message([image], "what?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = chat.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    expected = chat.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat.ask([image], "what?", max_new_tokens=2).strip() == expected.strip()
    assert (inputs["input_ids"] == chat.model.config.image_token_id).sum() == chat.model.config.num_visual_tokens


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "other model"])
def test_info_refuses_what_is_no_variant(variant, tmp_path, damage):
    broken = tmp_path / "broken"
    shutil.copytree(variant, broken)
    config = broken / "config.json"
    if damage == "missing":
        config.unlink()
    elif damage == "other model":
        config.write_text(json.dumps({"model_type": "llama"}))
    else:
        config.write_text("" if damage == "empty" else "{broken")
    with pytest.raises(ValueError) as error:
        describe_variant(str(broken))
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)

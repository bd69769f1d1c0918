"""Labels, answers and checks of the collator."""

import pytest
import torch

from fusedvlm.tests import tiny
from fusedvlm.trainers import ConversationCollator

SAMPLE = {
    "images": [tiny.picture(1)],
    "messages": [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "a red cat"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ],
}


def test_labels_are_answers_and_their_eos(processor):
    batch = ConversationCollator(processor)([SAMPLE, {"messages": SAMPLE["messages"]}])
    for labels in batch["labels"]:
        assert processor.tokenizer.decode(labels[labels != -100]) == "a red cat </s>yes </s>"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["attention_mask"][1, -1] == 0  # padded on the right
    assert batch["attention_mask"][1, 0] == 1


def test_answers_follow_the_order_of_segments(processor):
    two_images = {
        "images": [tiny.picture(1), tiny.picture(2)],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one?"}]},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two?"}]},
            {"role": "assistant", "content": "second"},
        ],
    }
    batch = ConversationCollator(processor, with_answers=True)([two_images, SAMPLE])
    tokenizer = processor.query_tokenizer
    texts = [
        tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch["answer_input_ids"], batch["answer_attention_mask"], strict=True)
    ]
    eos = tokenizer.eos_token
    # image by image, then by turn: image 1 is asked both questions, image 2 only the second
    assert texts == [f"first{eos}", f"second{eos}", f"second{eos}", f"a red cat{eos}", f"yes{eos}"]
    assert batch["question_turns"].tolist() == [0, 1, 1, 0, 1]


def test_long_answers_keep_their_eos(processor):
    sample = {**SAMPLE, "messages": [SAMPLE["messages"][0], {"role": "assistant", "content": "long " * 60}]}
    batch = ConversationCollator(processor, with_answers=True, max_answer_length=9)([sample])
    assert batch["answer_input_ids"].shape == (1, 9)
    assert batch["answer_input_ids"][0, -1] == processor.query_tokenizer.eos_token_id


def test_cached_views_replace_pixels(model, processor):
    pixels = processor.image_processor([tiny.picture(1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        views, _ = model.model.get_view_features(pixels)
    cached = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            *SAMPLE["messages"][1:],
        ],
        "view_features": views,
    }
    collator = ConversationCollator(processor)
    with torch.no_grad():
        one, other = model(**collator([SAMPLE])).loss, model(**collator([cached])).loss
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"messages": []}, "Sample 1: no messages"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "Sample 1: message 0 has role 'bot'"),
        (
            {"images": [tiny.picture(0)], "messages": [{"role": "assistant", "content": "a"}]},
            "Sample 1: 1 images but no user",
        ),
        (
            {
                "images": [tiny.picture(0)],
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            },
            "Sample 1: 1 images but 2 image parts",
        ),
    ],
)
def test_malformed_samples_are_named(processor, sample, message):
    with pytest.raises(ValueError, match=message):
        ConversationCollator(processor)([SAMPLE, sample])


def test_stage_one_needs_an_answer_to_every_question(processor):
    with pytest.raises(ValueError, match="answer to every question"):
        ConversationCollator(processor, with_answers=True)([{**SAMPLE, "messages": SAMPLE["messages"][:3]}])

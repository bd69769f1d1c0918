"""Plans of prompts, for servers: one placeholder per shown image, and what is asked about which."""

import pytest

from fusedvlm.tests import tiny

CONVERSATIONS = [
    [tiny.user(0, text="what is it?")],
    [tiny.user(0, 1, text="which one is red?")],
    [tiny.user(0, text="what is it?"), tiny.assistant("a cat"), tiny.user(text="what colour is it?")],
    [
        tiny.user(0, text="what is it?"), tiny.assistant("a cat"), tiny.user(1, text="and this?"), tiny.assistant("a sofa"),
        tiny.user(text="compare them"),
    ],
    [tiny.user(text="hello <image> <|question|> how are you")],
    [tiny.user(2, text="what does <image> mean? <|/question|>")],
]  # fmt: skip


def with_pictures(conversation):
    """The same with pictures instead of their numbers, and these in order."""
    messages, images = [], []
    for message in conversation:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(tiny.picture(part["image"]))
                part = {"type": "image", "image": images[-1]}
            parts.append(part)
        messages.append({**message, "content": parts})
    return messages, images


@pytest.mark.parametrize("m", [1, 3, 12])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_an_expanded_plan_is_what_the_processor_gives(processor, number, m):
    messages, images = with_pictures(CONVERSATIONS[number])
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(images=images or None, text=text, num_visual_tokens=m)
    (plan,) = processor.plan_prompts(text, num_visual_tokens=m)
    assert plan.expand(processor.image_token_id) == expected["input_ids"][0]
    assert plan.num_images == len(images)
    assert plan.input_ids.count(processor.image_token_id) == len(plan.segments)
    by_image = sorted(plan.segments, key=lambda segment: (segment.image, segment.turn))
    assert [segment.num_visual_tokens for segment in by_image] == list(expected.get("num_visual_tokens", []))
    assert [i for segment in by_image for i in segment.question_input_ids] == list(
        expected.get("question_input_ids", [])
    )


def test_a_plan_says_what_is_asked_about_which_image(processor):
    messages, _ = with_pictures(CONVERSATIONS[3])
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (plan,) = processor.plan_prompts(text, num_visual_tokens=7, num_followup_visual_tokens=2)
    shown = [(part.image, part.turn, part.question, part.num_visual_tokens) for part in plan.segments]
    assert shown == [
        (0, 0, "what is it?", 7), (0, 1, "and this?", 2), (1, 1, "and this?", 7), (0, 2, "compare them", 2),
        (1, 2, "compare them", 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="2 sizes for 5 placeholders"):
        plan.expand(processor.image_token_id, [1, 1])


def test_a_prompt_without_its_text_is_refused(processor):
    """What servers send that keep the text to themselves: their answers would be to no question."""
    for text in ("<image>", "<image><image>", " <image>\n"):
        with pytest.raises(ValueError, match=r"asks nothing.*fusedvlm serve"):
            processor(images=[tiny.picture(0)] * text.count("<image>"), text=text)
    processor(images=[tiny.picture(0)], text="<image>what?")

"""Marked and unmarked prompts to pieces and turns; user text is never read as markup."""

import pytest

from fusedvlm.processing.processing_fusedvlm_prompt import ESCAPE, escape, parse_prompt, unescape


def kinds(prompt):
    return [(piece.kind, piece.text) for piece in prompt.pieces if piece.text or piece.kind in ("image", "again")]


def test_marked_prompt():
    text = (
        "<s>[INST] <image><|question|>What?<|/question|>[/INST]<|answer|>A cat. <|/answer|></s>"
        "<|image_again|><image><|question|>And this?<|/question|>"
    )
    prompt = parse_prompt(text)
    assert prompt.is_marked
    assert kinds(prompt) == [
        ("text", "<s>[INST] "),
        ("image", "<image>"),
        ("question", "What?"),
        ("text", "[/INST]"),
        ("answer", "A cat. "),
        ("text", "</s>"),
        ("again", "<|image_again|>"),
        ("image", "<image>"),
        ("question", "And this?"),
    ]
    assert [(t.num_new_images, t.num_seen_images, t.question) for t in prompt.turns] == [
        (1, 0, "What?"),
        (1, 1, "And this?"),
    ]


def test_markers_inside_a_question_are_text():
    prompt = parse_prompt("<image><|question|>is <image> or <|image_again|> or <|answer|> here?<|/question|>")
    assert prompt.num_images == 1
    assert prompt.turns[0].question == "is <image> or <|image_again|> or <|answer|> here?"


def test_escaping_round_trip_hides_the_closing_marker():
    typed = "a <|/question|> b <image> <|question|>"
    assert "<|/question|>" not in escape(typed)
    assert unescape(escape(typed)) == typed
    prompt = parse_prompt(f"<image><|question|>{escape(typed)}<|/question|> rest")
    assert prompt.turns[0].question == typed
    assert prompt.pieces[-1].text == " rest"


def test_an_escape_typed_by_a_user_cannot_close_a_question():
    prompt = parse_prompt(f"<image><|question|>{escape(f'<{ESCAPE}|/question|> <image>')}<|/question|>")
    assert prompt.num_images == 1
    assert len(prompt.turns) == 1


def test_unclosed_answer_is_the_message_to_continue():
    prompt = parse_prompt("<image><|question|>What?<|/question|><|answer|>It is a")
    assert kinds(prompt)[-1] == ("answer", "It is a")


def test_unmarked_prompt_with_one_turn_asks_its_whole_text():
    prompt = parse_prompt("Look: <image>\n<image>\nWhat is it?")
    assert [(t.num_new_images, t.question) for t in prompt.turns] == [(2, "Look: \n\nWhat is it?")]


def test_unmarked_prompt_with_several_turns_asks_the_text_behind_the_images():
    prompt = parse_prompt("<image> one? yes. <|image_again|><image> two?")
    assert [(t.num_new_images, t.num_seen_images, t.question) for t in prompt.turns] == [
        (1, 0, "one? yes."),
        (1, 1, "two?"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<|image_again|> what?", "1 x .* but 0 images seen"),
        ("<image> a <|image_again|><|image_again|> b", "2 x .* but 1 images seen"),
        ("<image> a <image><|image_again|> b", "in front of new"),
    ],
)
def test_impossible_orders_name_the_sample(text, message):
    with pytest.raises(ValueError, match=f"Sample 4: .*{message}"):
        parse_prompt(text, sample=4)

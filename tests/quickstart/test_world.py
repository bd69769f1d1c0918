"""The world repeats under a seed, its answers are true of its pictures, its scores mean what they say."""

import numpy as np
import pytest
import torch

from fusedvlm.quickstart import world
from fusedvlm.quickstart.kinds import KINDS, Conversations, draw_questions
from fusedvlm.quickstart.language import Documents, build_tokenizer
from fusedvlm.quickstart.vision import cell_labels, token_of_cell


def test_samples_repeat_and_differ():
    one, again, other = world.make_sample(3, 5), world.make_sample(3, 5), world.make_sample(3, 6)
    assert np.array_equal(np.asarray(one.image), np.asarray(again.image))
    assert one.content == again.content
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))
    assert one.image.size == (64, 64)


def test_pictures_show_their_content():
    """The middle of a filled cell has the stated colour; an empty cell is the gray background."""
    checked = 0
    for index in range(60):
        sample = world.make_sample(1, index)
        if not sample.is_scene:
            continue
        pixels = np.asarray(sample.image).astype(int)
        for number, cell in enumerate(world.CELLS):
            y, x = 16 * (number // 4) + 8, 16 * (number % 4) + 8
            middle = pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3)
            if cell not in sample.content:
                assert np.ptp(middle) == 0
                assert middle.min() >= 190
            elif sample.content[cell][1] in ("circle", "square", "cross"):
                assert np.abs(np.median(middle, 0) - world.COLOURS[sample.content[cell][0]]).max() <= 19  # the tint
                checked += 1
    assert checked > 50


def test_both_kinds_of_picture_and_every_word_are_known():
    tokenizer = build_tokenizer()
    samples = [world.make_sample(0, index) for index in range(80)]
    assert {sample.is_scene for sample in samples} == {True, False}
    for sample in samples:
        texts = [sample.description(), sample.dense_question().text, sample.dense_question().answer]
        for text in texts:
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer("Colour at B3?")["input_ids"] == tokenizer("colour at b3")["input_ids"]


@pytest.mark.parametrize(
    ("task", "answer", "expected", "score"),
    [
        ("colour", " red ", "red", 1.0),
        ("colour", "red red", "red", 0.0),
        ("list", "a1 red star", "a1 red star b2 blue ring", 2 / 3),
        ("list", "b2 blue ring a1 red star", "a1 red star b2 blue ring", 1.0),
        ("list", "a1 blue star", "a1 red star", 0.0),
        ("list", "", "a1 red star", 0.0),
        ("read", "a1 k a2 q", "a1 k a2 z", 0.5),
        ("read", "k q", "a1 k a2 q", 0.0),
    ],
)
def test_scores(task, answer, expected, score):
    assert world.score(task, answer, expected) == pytest.approx(score)


def test_labels_and_tokens_of_cells():
    sample = world.Sample(None, True, {"a1": ("red", "circle"), "d4": ("black", "ring")})
    labels = cell_labels(sample)
    assert labels[0].tolist() == [1, 1, 0]
    assert labels[15].tolist() == [8, 6, 0]
    assert labels[1:15].sum() == 0
    places = token_of_cell()
    # view 1 is the upper left quadrant; its four tokens are a1 a2 b1 b2
    assert [places[world.CELLS.index(cell)] for cell in ("a1", "a2", "b1", "b2", "a3", "c1", "d4")] == [
        (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (3, 0), (4, 3),
    ]  # fmt: skip


def test_documents_teach_answers_only():
    tokenizer = build_tokenizer()
    documents = Documents(tokenizer, seed=0)
    for _ in range(20):
        ids, weights = documents.document(short=False)
        taught = tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w > 0])
        assert taught.endswith("</s>") or len(ids) == 320
        assert "scene" not in taught
        assert "panel" not in taught
        assert "at" not in taught.split()


def test_a_dense_question_stands_anywhere_among_the_others():
    """So that the frozen language model has seen one-word questions behind a dense answer, and ends theirs."""
    tokenizer = build_tokenizer()
    documents = Documents(tokenizer, seed=0)
    places = set()
    for _ in range(80):
        words = tokenizer.decode(documents.document(short=True)[0]).split()
        asked = [word for word in words if word in ("colour", "shape", "letter", "list", "read")]
        places |= {asked.index(word) for word in asked if word in ("list", "read")}
    assert {0, 1, 8} <= places


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_of_their_kind_and_repeat(kind):
    samples = [world.make_sample(0, index) for index in range(12)]
    data = Conversations(samples, torch.zeros(12, 5, 5, 8), 6, seed=1, kinds=(kind, "dense"))
    assert data.source_names().tolist() == [kind, "dense"] * 3
    before, is_dense, behind = KINDS[kind]
    for index in (0, 2, 4):
        messages = data[index]["messages"]
        assert messages == data[index]["messages"]
        asked = [message["content"][-1]["text"] for message in messages[::2]]
        expected = [False] * before + [True] * is_dense + [False] * behind
        assert [" at " not in text for text in asked] == expected
        assert len(set(asked)) == len(asked)
        assert [part["type"] for message in messages for part in message["content"]].count("image") == 1
    with pytest.raises(ValueError, match="must be one of one_word"):
        draw_questions("short", samples[0], np.random.default_rng(0))


def test_panels_are_drawn_as_often_as_asked():
    samples = [world.make_sample(0, index) for index in range(40)]
    data = Conversations(samples, torch.zeros(40, 1), 200, 0, ("one_word",), {"one_word": 0.8})
    letters = sum("letter" in data[index]["messages"][0]["content"][-1]["text"] for index in range(200))
    assert abs(letters - 160) < 6 * (200 * 0.8 * 0.2) ** 0.5

"""The world repeats under a seed, its answers are true of its pictures, its scores mean what they say."""

import numpy as np
import pytest

from fusedvlm.quickstart import world
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

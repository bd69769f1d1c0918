"""Filters: what each drops and why, on worked cases and on whatever hypothesis comes up with."""

import math

import pytest
from hypothesis import given, strategies as st

from fusedvlm.data.generate.answer_filters import (
    LETTERS,
    PageLimits,
    Question,
    cosine,
    keep_questions,
    length_ratio,
    looped_tail,
    parse_questions,
    question_problem,
    reading_problem,
    repetition,
)

CHOICE = "Question: What is on the table?\nA. A cup\nB. A book\nC. A lamp\nD. A hat\nAnswer: C\n"
words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@st.composite
def questions(draw):
    text = " ".join(draw(st.lists(words, min_size=3, max_size=8))) + "?"
    if draw(st.booleans()):
        return Question("yes_no", text, draw(st.sampled_from(["Yes", "No"])))
    options = draw(st.lists(words, min_size=4, max_size=4))
    return Question("multiple_choice", text, draw(st.sampled_from(LETTERS)), tuple(zip(LETTERS, options, strict=True)))


def written(question: Question) -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in question.options)
    return f"Question: {question.text}\n{options}Answer: {question.answer}\n"


@given(st.lists(questions(), max_size=5))
def test_what_is_written_as_asked_for_is_read_back(asked):
    for kind in ("yes_no", "multiple_choice"):
        some = [question for question in asked if question.kind == kind]
        assert parse_questions(kind, "\n".join(map(written, some))) == some


@given(st.text(max_size=400))
def test_any_reply_is_read_and_what_is_kept_has_the_right_form(reply):
    for kind in ("yes_no", "multiple_choice"):
        found = parse_questions(kind, reply)
        kept, dropped = keep_questions(found)
        assert len(kept) + sum(dropped.values()) == len(found)
        for question in kept:
            assert question_problem(question) is None


@given(st.lists(questions(), max_size=6))
def test_filtering_what_was_kept_drops_nothing(asked):
    kept, _ = keep_questions(asked)
    assert keep_questions(kept) == (kept, {})


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("Question: Is the cat red?\nAnswer: Yes", None),
        ("<think>Question: Why?\nAnswer: No</think>\nQuestion: Is the cat red?\nAnswer: Yes", None),
        ("1. **Question:** Is the cat red?\n**Answer:** No", None),
        ("Question 2: Is the cat red?\nAnswer: Yes.", "answer is not Yes or No"),
        ("Question: Is the cat red?\nAnswer: yes", "answer is not Yes or No"),
        ("Question: Is the cat red?\nAnswer: Yes, it is", "answer is not Yes or No"),
        ("Question: Is the cat red?", "answer is not Yes or No"),
        ("Question: The cat is red.\nAnswer: Yes", "no question"),
        ("Question: Is the cat red (yes)?\nAnswer: Yes", "question gives the answer away"),
        ("Question: Is a cat mentioned in the description?\nAnswer: Yes", "question speaks of the description"),
    ],
)
def test_yes_no(reply, problem):
    [question] = parse_questions("yes_no", reply)
    assert question_problem(question) == problem


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        ("A. A cup", "A) A cup", None),
        ("B. A book\n", "", "options are not A, B, C and D"),
        ("D. A hat", "D. A hat\nE. A shoe", "options are not A, B, C and D"),
        ("B. A book", "B. a CUP", "options are empty or repeated"),
        ("B. A book", "B. ", "options are empty or repeated"),
        ("Answer: C", "Answer: E", "answer is not one letter of A to D"),
        ("Answer: C", "Answer: C. A lamp", "answer is not one letter of A to D"),
        ("Answer: C", "Answer: A and C", "answer is not one letter of A to D"),
        ("What is on the table?", "Where does a lamp stand?", "question gives the answer away"),
        ("What is on the table?", "Is it a lamp or a hat?", None),
    ],
)
def test_multiple_choice(old, new, problem):
    [question] = parse_questions("multiple_choice", CHOICE.replace(old, new) if old else CHOICE)
    assert question_problem(question) == problem


def test_the_same_question_is_kept_once():
    kept, dropped = keep_questions(parse_questions("multiple_choice", CHOICE + "\n" + CHOICE))
    assert len(kept) == 1
    assert dropped == {"asked twice": 1}


PAGE = " ".join(f"word{number} of the page" for number in range(40))


@pytest.mark.parametrize(
    ("reading", "similarity", "problem"),
    [
        (PAGE, 0.9, None),
        (PAGE, None, None),
        ("Too few words.", 0.9, "too short"),
        (PAGE * 3, 0.9, "length too far from the original's"),
        (PAGE[: len(PAGE) // 3], 0.9, "length too far from the original's"),
        (PAGE[: len(PAGE) // 2] + " the end of it" * 30, 0.9, "repeats itself"),
        (PAGE + "-" * 200, 0.9, "repeats itself"),
        (PAGE, 0.5, "not similar to the original"),
        (PAGE, math.nan, "not similar to the original"),
    ],
)
def test_pages(reading, similarity, problem):
    assert reading_problem(PAGE, reading, similarity, PageLimits()) == problem


@given(st.lists(words, min_size=1, max_size=60), st.integers(1, 9))
def test_repetition_is_a_share_and_grows_with_copies(some, run_length):
    text = " ".join(some)
    assert 0 <= repetition(text, run_length) < 1
    assert repetition(" ".join([text] * 40), run_length) >= repetition(text, run_length) - 1e-12
    assert repetition(" ".join(f"{number}" for number in range(50)), run_length) == 0


@given(st.text("abc ", min_size=1, max_size=30).filter(str.strip), st.integers(5, 20))
def test_loops_are_found_whatever_they_are_made_of(piece, times):
    piece = " ".join(piece.split())
    assert looped_tail("Some page. 123 456 " + f"{piece} " * times) >= (len(piece) + 1) * (times - 1)


def test_a_text_that_does_not_loop_has_no_tail():
    assert looped_tail(PAGE) == 0
    assert looped_tail("") == 0


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=9))
def test_cosine(vector):
    assert cosine(vector, [0.0] * len(vector)) == 0
    if any(abs(value) > 1e-3 for value in vector):
        assert cosine(vector, vector) == pytest.approx(1)
        assert cosine(vector, [-2 * value for value in vector]) == pytest.approx(-1)


def test_lengths_without_an_original():
    assert length_ratio("", "abc") == math.inf
    assert length_ratio("a b c", "abcabc") == 2
    assert reading_problem(" ", PAGE, None, PageLimits()) == "length too far from the original's"


@pytest.mark.parametrize("wrong", [{"min_ratio": 3}, {"max_repetition": 2}, {"min_similarity": 5}, {"run_length": 0}])
def test_limits_that_cannot_hold(wrong):
    with pytest.raises(ValueError, match="cannot hold"):
        PageLimits(**wrong)

"""Parsing and scores of single answers: what counts, what does not, and the odd cases of the published evaluations."""

import pytest

from fusedvlm.evaluation.tasks.answer_parsing import parse_choice, parse_yes_no, without_signs
from fusedvlm.evaluation.tasks.answer_scores import (
    anls,
    contains_answer,
    edit_distance,
    exact_match,
    normalize_answer,
    relaxed_accuracy,
    vqa_accuracy,
)

OPTIONS = {"A": "red", "B": "dark green", "C": "blue", "D": "7"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B. dark green", "B"), ("dark green", "B"), ("Dark Green.", "B"), (r"\boxed{C}", "C"),
        ("The answer is C.", "C"), ("The correct answer is **C** and I can tell you why that is so", "C"),
        ("b", None), ("A or B", None), ("red or blue", None), ("purple", None), ("", None),
        ("A man stands in front of a wall", None), ("a very long text that says red but also much else, on and on", None),
        ("I'm sorry, but without the image provided I cannot", "Z"), ("Z", "Z"), ("7", "D"),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice(answer, letter):
    assert parse_choice(answer, OPTIONS) == letter


def test_a_choice_without_options_is_never_understood():
    assert parse_choice("A", {}) is None


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("Yes, it is.", "Yes"),
        ("no/yes", None),
        ("nothing", None),
        ("", None),
        ("YES!", "Yes"),
    ],
)
def test_yes_or_no(answer, parsed):
    assert parse_yes_no(answer) == parsed


def test_exact_match_ignores_case_and_space_at_the_ends_alone():
    assert exact_match(" Red ", ["red"]) == 1
    assert exact_match("dark  red", ["dark red"]) == 0
    assert exact_match("red", ["blue", "RED"]) == 1


def test_anls_is_the_best_similarity_and_nothing_below_one_half():
    assert anls("invoice", ["invoice", "x"]) == 1
    assert anls("invoce", ["invoice"]) == pytest.approx(1 - 1 / 7)
    assert anls("inv", ["invoice"]) == 0  # 4 of 7
    assert anls("", [""]) == 1


def test_edit_distance_against_its_definition():
    def naive(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        return min(
            naive(one[1:], other) + 1, naive(one, other[1:]) + 1, naive(one[1:], other[1:]) + (one[0] != other[0])
        )

    for one, other in [("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"), ("same", "same")]:
        assert edit_distance(one, other) == naive(one, other)


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("10.4", "10", 1),
        ("10.6", "10", 0),
        ("10%", "0.1", 1),
        ("Red", "red", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("", "3", 0),
    ],
)
def test_relaxed_accuracy(answer, right, score):
    assert relaxed_accuracy(answer, [right]) == score


def test_vqa_accuracy_leaves_every_annotator_out_once():
    said = ["red"] * 2 + ["blue"] * 8
    # Two of ten say red: the eight others each see two, the two see one.
    assert vqa_accuracy("red", said) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa_accuracy("Blue.", said) == 1
    assert vqa_accuracy("red", ["red"]) == 0  # one annotator has nobody to agree with


def test_answers_are_made_alike_as_the_vqa_evaluation_does():
    assert normalize_answer("The dont-walk sign, two!") == "don't walk sign 2"
    assert normalize_answer("1,000 a.m.") == "1000 am"
    assert normalize_answer("3.5\tkg") == "3.5 kg"
    assert without_signs("a-b c, d") == "a b c d"


def test_an_answer_inside_what_was_said():
    assert contains_answer("the sign says\nSTOP here", ["stop"]) == 1
    assert contains_answer("x ^ 2", ["x^2"], keep_case=True, drop_spaces=True) == 1
    assert contains_answer("X^2", ["x^2"], keep_case=True, drop_spaces=True) == 0

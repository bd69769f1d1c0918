"""What a whole run of the quickstart must reach; `make goals` asks a trained family, and the test suite trains none."""

import json
import os
from pathlib import Path

import pytest

FAMILY = os.environ["FUSEDVLM_FAMILY"]
ONE_WORD, DENSE = ("colour", "shape", "letter"), ("list", "read")


def load(name: str):
    """A JSON file of the family."""
    return json.loads((Path(FAMILY) / name).read_text(encoding="utf-8"))


def report() -> dict:
    """The report of the run: of several seeds there is one, beside their folders."""
    beside = Path(FAMILY) / "report.json"
    return json.loads((beside if beside.exists() else Path(FAMILY).parent / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scores() -> dict:
    """{(task, m): score} at the variants' m and between them."""
    rows = load("results.json")["scores"] + load("measured/between.json")["scores"]
    return {(row["task"], row["num_visual_tokens"]): row for row in rows}


@pytest.mark.parametrize("task", ONE_WORD)
def test_one_token_is_enough_for_one_word(scores, task):
    assert scores[task, 1]["score"] >= 0.95


def test_dense_questions_gain_with_every_doubling(scores):
    means = [sum(scores[task, m]["score"] for task in DENSE) / 2 for m in (2, 4, 8, 16, 32)]
    assert means == sorted(means)
    assert means[-1] >= 0.70


def test_second_turns_are_answered_as_well_as_first_ones(scores):
    turns = load("measured/second_turns.json")
    assert {turn["after"] for turn in turns} == {"one_word", "dense"}
    below = {
        (turn["after"], turn["num_followup_visual_tokens"], turn["task"]): scores[
            turn["task"], turn["num_followup_visual_tokens"]
        ]["score"]
        - turn["score"]
        for turn in turns
    }
    assert max(below.values()) <= 0.03, below


@pytest.mark.parametrize("m", [3, 6, 12, 24])
@pytest.mark.parametrize("task", ONE_WORD + DENSE)
def test_every_m_in_between_is_served(task, m):
    """To two standard errors it scores between its neighbors; the record says how far from the line between them."""
    (family,) = [one for one in report()["families"] if Path(one["folder"]).name == Path(FAMILY).name]
    (row,) = [row for row in family["between"] if (row["task"], row["m"]) == (task, m)]
    assert row["is_between"], row

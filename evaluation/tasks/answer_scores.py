"""How near an answer is to the right ones, from 0 to 1 (docs/evaluation.md, "Metrics")."""

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .answer_parsing import without_signs

RELATIVE_CHANGE = 0.05  # by which a number may be off (Methani et al., 2020)
LEAST_SIMILARITY = 0.5  # below which an answer counts nothing (Biten et al., 2019)
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 when the answer is one of the right ones, but for case and space at the ends."""
    return float(answer.strip().lower() in {text.strip().lower() for text in right})


def anls(answer: str, right: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity with the nearest right answer; below 0.5 it is 0 (DocVQA)."""
    best = max(1 - _normalized_distance(text, answer) for text in right)
    return best if best >= LEAST_SIMILARITY else 0.0


def _normalized_distance(one: str, other: str) -> float:
    length = max(len(one.upper()), len(other.upper()))
    plain = [" ".join(text.strip().lower().split()) for text in (one, other)]
    return edit_distance(*plain) / length if length else 0.0


def edit_distance(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != wanted))
    return row[-1]


def relaxed_accuracy(answer: str, right: Sequence[str]) -> float:
    """1 when a number is within 5 % of a right one, or a text is the same but for case (ChartQA)."""
    return float(any(_is_close(answer.strip(), text) for text in right))


def _is_close(answer: str, right: str) -> bool:
    found, wanted = _number(answer), _number(right)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= RELATIVE_CHANGE
    return answer.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_accuracy(answer: str, right: Sequence[str]) -> float:
    """Mean over the annotators of min(1, how many of the others say the same / 3) (VQA; Antol et al., 2015).

    With fewer than four right answers this cannot reach 1; use `exact_match` for those.
    """
    plain = normalize_answer(answer)
    said = [normalize_answer(text) for text in right]
    matches = said.count(plain)
    return sum(min(1.0, (matches - (text == plain)) / 3) for text in said) / len(said)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, number words as digits, contractions with their apostrophe."""
    plain = without_signs(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(contractions().get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1)
def contractions() -> dict[str, str]:
    """{word as typed: with its apostrophe}, the list of the VQA evaluation, with its oddities."""
    with open(Path(__file__).parent / "contractions.csv", encoding="utf-8", newline="") as file:
        return {row["typed"]: row["written"] for row in csv.DictReader(file)}


def contains_answer(answer: str, right: Sequence[str], keep_case: bool = False, drop_spaces: bool = False) -> float:
    """1 when a right answer stands somewhere in the answer (OCRBench).

    Args:
        keep_case: whether case matters.
        drop_spaces: whether all spaces are left out, as for formulas.
    """

    def plain(text: str) -> str:
        text = text if keep_case else text.lower()
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if drop_spaces else text

    return float(any(plain(text) in plain(answer) for text in right))

"""What generated data must be to be kept: pure functions that return why a piece is dropped, or None."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["yes_no", "multiple_choice"]
KINDS: tuple[Kind, ...] = ("yes_no", "multiple_choice")
LETTERS = "ABCD"

FIELD = re.compile(r"^\W*(?:\d+[.)]\s*)?\W*(question|answer|[A-Z])(?:\s+\d+)?\W*?\s*[:.)]\W*?\s*(.*)$", re.IGNORECASE)
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)  # what reasoning models say to themselves
TOLD = re.compile(
    r"\b(according to|mentioned in|described in|based on|in|from|by)\s+(the|this|that)\s+"
    r"(description|text|caption|paragraph|passage)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """A question as a language model wrote it, not checked yet. `options` pairs letters with texts."""

    kind: Kind
    text: str
    answer: str
    options: tuple[tuple[str, str], ...] = ()


def parse_questions(kind: Kind, reply: str) -> list[Question]:
    """Questions of a reply in the form that the templates ask for: `Question:`, the options, `Answer:`, a blank line.

    Nothing is corrected: what is not there is empty and `question_problem` names it.

    >>> parse_questions("yes_no", "Question: Is it red?\\nAnswer: Yes")
    [Question(kind='yes_no', text='Is it red?', answer='Yes', options=())]
    """
    found: list[dict] = []
    for line in THOUGHTS.sub("", reply).splitlines():
        match = FIELD.match(line)
        if match is None:
            continue
        name, value = match[1].lower(), match[2].strip().strip("*").strip()
        if name == "question":
            found.append({"text": value, "answer": "", "options": []})
        elif found and name == "answer":
            found[-1]["answer"] = value
        elif found and kind == "multiple_choice" and match[1].isupper() and len(name) == 1:
            found[-1]["options"].append((match[1], value))
    return [Question(kind, one["text"], one["answer"], tuple(one["options"])) for one in found]


def question_problem(question: Question) -> str | None:
    """Why a question cannot be used: its format, or because it needs no image to be answered."""
    if not question.text.endswith("?") or len(question.text) < 8:
        return "no question"
    if TOLD.search(question.text):
        return "question speaks of the description"
    if question.kind == "yes_no":
        if question.answer not in ("Yes", "No"):
            return "answer is not Yes or No"
        leaked = re.search(r"\((yes|no)\)|answer is (yes|no)", question.text, re.IGNORECASE)
        return "question gives the answer away" if leaked else None
    return _choice_problem(question)


def _choice_problem(question: Question) -> str | None:
    if [letter for letter, _ in question.options] != list(LETTERS):
        return "options are not A, B, C and D"
    texts = [normalize(text) for _, text in question.options]
    if not all(texts) or len(set(texts)) < len(texts):
        return "options are empty or repeated"
    if question.answer not in tuple(LETTERS):
        return "answer is not one letter of A to D"
    right = texts[LETTERS.index(question.answer)]
    others = [text for text in texts if text != right]
    asked = f" {normalize(question.text)} "
    if f" {right} " in asked and not any(f" {text} " in asked for text in others):
        return "question gives the answer away"
    return None


def normalize(text: str) -> str:
    """Words in lower case, nothing between them but one blank."""
    return " ".join(re.findall(r"\w+", text.lower()))


def keep_questions(questions: Sequence[Question]) -> tuple[list[Question], Counter]:
    """Questions without problems, each text once, and how many were dropped for what."""
    kept: list[Question] = []
    dropped: Counter = Counter()
    seen: set[str] = set()
    for question in questions:
        problem = question_problem(question)
        if problem is None and normalize(question.text) in seen:
            problem = "asked twice"
        if problem is not None:
            dropped[problem] += 1
            continue
        seen.add(normalize(question.text))
        kept.append(question)
    return kept, dropped


@dataclass(frozen=True)
class PageLimits:
    """When a re-read page is kept. The paper names the four filters, not their limits: these are ours.

    `min_words` in the reading; `min_ratio` and `max_ratio` of its length to the original's, in characters;
    `max_repetition` share of repeated runs of `run_length` words; `min_similarity` of sentence embeddings.
    """

    min_words: int = 30
    min_ratio: float = 0.5
    max_ratio: float = 2.0
    max_repetition: float = 0.2
    run_length: int = 8
    min_similarity: float = 0.7

    def __post_init__(self) -> None:
        if not (0 < self.min_ratio <= self.max_ratio and 0 <= self.max_repetition <= 1 and self.run_length >= 1):
            raise ValueError(
                f"{self} cannot hold: 0 < min_ratio <= max_ratio, 0 <= max_repetition <= 1, run_length >= 1."
            )
        if self.min_words < 0 or not -1 <= self.min_similarity <= 1:
            raise ValueError(f"{self} cannot hold: min_words >= 0, -1 <= min_similarity <= 1.")


def reading_problem(original: str, reading: str, similarity: float | None, limits: PageLimits) -> str | None:
    """Why a re-read page is dropped: the four filters, cheapest first.

    Args:
        original: text the page came with.
        reading: what the model read.
        similarity: of the two texts' embeddings; None leaves that filter out.
        limits: bounds of the filters.
    """
    if len(reading.split()) < limits.min_words:
        return "too short"
    if not limits.min_ratio <= length_ratio(original, reading) <= limits.max_ratio:
        return "length too far from the original's"
    if repetition(reading, limits.run_length) > limits.max_repetition or looped_tail(reading) >= LOOP:
        return "repeats itself"
    if similarity is not None and not similarity >= limits.min_similarity:  # also true for NaN
        return "not similar to the original"
    return None


def length_ratio(original: str, reading: str) -> float:
    """Characters of the reading per character of the original, white space aside; infinite for an empty original."""
    long = len("".join(original.split()))
    return len("".join(reading.split())) / long if long else math.inf


def repetition(text: str, run_length: int = 8) -> float:
    """Share of runs of `run_length` words that occurred before: 0 for a text without, near 1 for an endless loop."""
    words = text.split()
    runs = [tuple(words[start : start + run_length]) for start in range(len(words) - run_length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


LOOP = 120  # characters; three rows of a table's rule are shorter


def looped_tail(text: str, longest: int = 200) -> int:
    """Characters at the end of a text that are one piece of at most `longest` characters again and again.

    >>> looped_tail("A page. " + "and so on " * 30) >= 280, looped_tail("A page that ends.")
    (True, 0)
    """
    text = " ".join(text.split())
    best = 0
    for size in range(1, min(longest, len(text) // 3) + 1):
        same = 0
        while same + size < len(text) and text[-1 - same] == text[-1 - same - size]:
            same += 1
        if same >= 2 * size:  # three times at least
            best = max(best, same + size)
    return best


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Cosine of two vectors; 0 when one is zero.

    Raises:
        ValueError: for vectors of different lengths.
    """
    product = sum(a * b for a, b in zip(first, second, strict=True))
    lengths = math.sqrt(sum(a * a for a in first)) * math.sqrt(sum(b * b for b in second))
    return product / lengths if lengths else 0.0

"""`num_visual_tokens="auto"`: m chosen from the question alone, before any image is read.

A calibration says for every word what it adds to the score expected at each m; a question gets the smallest m whose
expected score is within a tolerance of the best. `fusedvlm scaling calibrate` fits it and measures what it saves.
"""

import math
import re
from typing import Any

AUTO = "auto"
WORD = re.compile(r"[^\W_]+")


def words_of(question: str) -> list[str]:
    """The words of a question, each once, in lower case."""
    return list(dict.fromkeys(WORD.findall(question.lower())))


class QuestionCalibration:
    """Chooses m for a question.

    A question with too few known words gets the largest m: nothing is known of what it needs.

    Args:
        record: plain data, as `fusedvlm scaling calibrate` writes it: `counts` (the m to choose from, ascending),
            `bias` (the expected score at each), `words` ({word: what it adds at each}), `tolerance` (what may be lost),
            `known_share` (of a question's words that must be known).

    Raises:
        ValueError: naming what is missing or does not fit.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        try:
            self.counts = [int(m) for m in record["counts"]]
            self.bias = [float(value) for value in record["bias"]]
            self.words = {str(word): [float(v) for v in values] for word, values in record["words"].items()}
            self.tolerance, self.known_share = float(record["tolerance"]), float(record["known_share"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"Not a calibration of num_visual_tokens='auto' ({type(error).__name__}: {str(error)[:80]}); "
                "`fusedvlm scaling calibrate` writes one."
            ) from None
        numbers = [*self.bias, *(value for values in self.words.values() for value in values), self.tolerance]
        lengths = {len(self.bias), *(len(values) for values in self.words.values())}
        if (
            not self.counts
            or self.counts != sorted(set(self.counts))
            or lengths != {len(self.counts)}
            or not all(map(math.isfinite, numbers))
        ):
            raise ValueError(
                f"Damaged calibration of num_visual_tokens='auto': counts {self.counts[:8]} with {sorted(lengths)[:4]} "
                "numbers each; counts must rise, and every word have one finite number for each."
            )

    def choose(self, question: str) -> int:
        """m for a question."""
        words = words_of(question)
        known = [self.words[word] for word in words if word in self.words]
        if not known or len(known) < self.known_share * len(words):
            return self.counts[-1]
        expected = [bias + sum(column) for bias, *column in zip(self.bias, *known, strict=True)]
        least = max(expected) - self.tolerance
        return next(m for m, score in zip(self.counts, expected, strict=True) if score >= least)

"""CIDEr, BLEU and ROUGE-L of captions, without Java (docs/evaluation.md, "Captions").

Two ways to words: `raw` splits at spaces and keeps case and punctuation, as VLMEvalKit does and so the paper's numbers;
`ptb` is Penn Treebank words in lower case without punctuation, as the official COCO scores. They differ visibly.

Values are those of pycocoevalcap, times 1 (VLMEvalKit shows them times 100).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 4  # words of an n-gram
WIDTH = 6.0  # of CIDEr's penalty for another length
RECALL_WEIGHT = 1.2  # ROUGE-L's beta
SMALL, TINY = 1e-9, 1e-15  # keep BLEU's quotients finite, and 0 where nothing was said

Ngrams = Counter[tuple[str, ...]]

# Penn Treebank conventions, one after the other.
BRACKETS = {"(": " -lrb- ", ")": " -rrb- ", "{": " -lcb- ", "}": " -rcb- ", "[": " -lsb- ", "]": " -rsb- "}
SPLITS = [
    (re.compile(r"[“”\"«»]|``|''"), " '' "),
    (re.compile(r"\.\.\.|…"), " ... "),
    (re.compile(r"--+"), " -- "),
    (re.compile(r"([;@#$%&?!*])"), r" \1 "),
    (re.compile(r"([:,])(?!\d)"), r" \1 "),
    (re.compile(r"(?<!\d)([:,])"), r" \1 "),
    (re.compile(r"([^.\s])\.(?=\s*(?:''|-r[rcs]b-|\s)*$)"), r"\1 . "),
    (re.compile(r"(?<=\s)'(?=\w)|(?<=\w)'(?=\s)|(?<!\w)'(?!\w)"), " ' "),
    (re.compile(r"(\w)('s|'m|'d|'ll|'re|'ve)\b"), r"\1 \2"),
    (re.compile(r"(\w)(n't)\b"), r"\1 \2"),
    (re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))"), r"\1 "),
]  # fmt: skip
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def raw_words(text: str) -> str:
    """The text as it is."""
    return text


def ptb_words(text: str) -> str:
    """Penn Treebank words in lower case, without punctuation, one space between.

    >>> ptb_words("A dog doesn't sit (there), it's running.")
    "a dog does n't sit -lrb- there -rrb- it 's running"
    """
    text = f" {' '.join(text.lower().split())} "
    for bracket, name in BRACKETS.items():
        text = text.replace(bracket, name)
    for pattern, replacement in SPLITS:
        text = pattern.sub(replacement, text)
    return " ".join(word for word in text.split() if word not in PUNCTUATION)


TOKENIZERS: dict[str, Callable[[str], str]] = {"raw": raw_words, "ptb": ptb_words}


def count_ngrams(text: str) -> Ngrams:
    """How often each run of one to four words occurs."""
    words = text.split()
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, LONGEST + 1)
        for start in range(len(words) - size + 1)
    )  # fmt: skip


# -- CIDEr -------------------------------------------------------------------------------------------------------------


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n,) CIDEr-D of each caption (Vedantam et al., 2015); their mean is the score of the set.

    How rare an n-gram is comes from the references of this very set, so scores of other sets cannot be compared, and of
    a single image every score is 0.

    Args:
        captions: n captions, tokenized.
        references: of each image.
    """
    counted = [[count_ngrams(text) for text in texts] for texts in references]
    documents: Counter[tuple[str, ...]] = Counter()
    for texts in counted:
        documents.update({ngram for text in texts for ngram in text})
    weigh = _Weights(documents, math.log(len(captions)))
    scores = []
    for caption, texts in zip(captions, counted, strict=True):
        said = weigh(count_ngrams(caption))
        scores.append(10 * float(np.mean([_similarity(said, weigh(text)) for text in texts])))
    return np.array(scores)


@dataclass(frozen=True)
class _Weighted:
    """Weights of n-grams by length, their norms, and the number of two-word runs, which stands for the length."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


@dataclass(frozen=True)
class _Weights:
    documents: Counter
    log_images: float

    def __call__(self, ngrams: Ngrams) -> _Weighted:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for ngram, count in ngrams.items():
            rarity = self.log_images - math.log(max(1, self.documents[ngram]))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(weight**2 for weight in part.values())) for part in weights]
        return _Weighted(weights, norms, sum(count for ngram, count in ngrams.items() if len(ngram) == 2))


def _similarity(said: _Weighted, wanted: _Weighted) -> float:
    penalty = math.exp(-((said.length - wanted.length) ** 2) / (2 * WIDTH**2))
    parts = []
    for size in range(LONGEST):
        other = wanted.weights[size]
        product = sum(
            min(weight, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, weight in said.weights[size].items()
        )
        norms = said.norms[size] * wanted.norms[size]
        parts.append(product / norms if norms else product)
    return penalty * sum(parts) / LONGEST


# -- BLEU --------------------------------------------------------------------------------------------------------------


def bleu_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 10) of each caption: its words, words of the nearest reference, then right and possible n-grams by length."""
    rows = []
    for caption, texts in zip(captions, references, strict=True):
        said, length = count_ngrams(caption), len(caption.split())
        most: Ngrams = Counter()
        for text in texts:
            most |= count_ngrams(text)
        lengths = [len(text.split()) for text in texts]
        nearest = min((abs(other - length), other) for other in lengths)[1]
        right = [0] * LONGEST
        for ngram, count in (said & most).items():
            right[len(ngram) - 1] += count
        possible = [max(0, length - size) for size in range(LONGEST)]
        rows.append([length, nearest, *right, *possible])
    return np.array(rows, dtype=np.float64)


def bleu(counts: np.ndarray) -> list[float]:
    """BLEU-1 to BLEU-4 of a set (Papineni et al., 2002), from rows of `bleu_counts`."""
    said, wanted, *grams = counts.sum(0)
    ratio = (said + TINY) / (wanted + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for size in range(LONGEST):
        product *= (grams[size] + TINY) / (grams[LONGEST + size] + SMALL)
        scores.append(product ** (1 / (size + 1)) * brevity)
    return scores


# -- ROUGE-L -----------------------------------------------------------------------------------------------------------


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption (Lin, 2004): common subsequences, best precision and best recall of any reference."""
    words = caption.split(" ")
    pairs = [(common_length(words, text.split(" ")), len(text.split(" "))) for text in references]
    precision = max(common / len(words) for common, _ in pairs)
    recall = max(common / length for common, length in pairs)
    if not precision or not recall:
        return 0.0
    weight = RECALL_WEIGHT**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        previous = 0
        for place, wanted in enumerate(other, 1):
            previous, row[place] = row[place], previous + 1 if word == wanted else max(row[place], row[place - 1])
    return row[-1]

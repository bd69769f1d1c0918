"""The kinds of questions: how each is asked, parsed and scored; one small class each."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from .answer_parsing import parse_choice, parse_yes_no
from .answer_scores import anls, contains_answer, exact_match, relaxed_accuracy, vqa_accuracy
from .caption_scores import LONGEST, TOKENIZERS, bleu, bleu_counts, cider, rouge_l
from .record_files import RecordFile
from .task import Judged, Metric, Record, bootstrap_error, mean_metric

SHORT = "\nAnswer the question using a single word or phrase."
SELECT = "Please select the correct answer from the options above. \n"
# Columns by which scores are told apart, beside the whole.
GROUPS = ("category",)


@dataclass
class FileTask:
    """Questions of a file, asked as they stand.

    Args:
        source: the file.
        max_new_tokens: cap of an answer.
        bare_question: whether the fusion module reads the question alone, without options and instructions.
        scale: of the scores: 1, or 100 for per cent.
        preset: name of the prompts and caps.
        about: further facts of the record.
    """

    source: RecordFile
    max_new_tokens: int = 32
    bare_question: bool = False
    scale: float = 1.0
    preset: str = "plain"
    about: dict[str, Any] = field(default_factory=dict)
    metric_name: str = ""  # as tables show it; the kind's own by default
    metric: ClassVar[str] = ""
    _records: list[Record] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Of the file, without folder and ending."""
        return self.source.name

    def records(self) -> Sequence[Record]:
        """Every question of the file, which is read once."""
        if self._records is None:
            self._records = self.source.read()
        return self._records

    def prompt(self, record: Record) -> str:
        """The question as it stands."""
        return record.question

    def question(self, record: Record) -> str:
        """What the fusion module reads."""
        return record.question if self.bare_question else self.prompt(record)

    def parse(self, record: Record, answer: str) -> str | None:
        """The whole answer; None for an empty one."""
        return answer.strip() or None

    def score(self, record: Record, parsed: str | None) -> float:
        """0 to 1; what cannot be parsed is wrong."""
        return 0.0 if parsed is None else self.compare(parsed, record)

    def compare(self, parsed: str, record: Record) -> float:
        """How right a parsed answer is, 0 to 1."""
        return exact_match(parsed, record.answers)

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """The mean."""
        return [mean_metric(self.metric_name or self.metric, [entry.score for entry in judged], self.scale)]

    def facts(self) -> dict[str, Any]:
        """File, checksum, preset, what the fusion module reads."""
        return {
            "data_file": self.source.path.rpartition("/")[2] or self.source.path,
            "data_sha256": self.source.checksums()["sha256"],
            "split": self.source.split,
            "preset": self.preset,
            "max_new_tokens": self.max_new_tokens,
            "question": "bare question" if self.bare_question else "whole prompt",
            "limit": self.source.limit,
            **self.about,
        }


class ExactMatch(FileTask):
    """Right when the answer is one of the right ones, but for case and space at its ends."""

    metric = "exact_match"


class Anls(FileTask):
    """Average normalized Levenshtein similarity."""

    metric = "anls"

    def compare(self, parsed: str, record: Record) -> float:
        """Similarity with the nearest right answer."""
        return anls(parsed, record.answers)


class RelaxedAccuracy(FileTask):
    """Numbers may be 5 % off."""

    metric = "relaxed_accuracy"

    def compare(self, parsed: str, record: Record) -> float:
        """1 or 0."""
        return relaxed_accuracy(parsed, record.answers)


class VqaAccuracy(FileTask):
    """Agreement with ten annotators."""

    metric = "vqa_accuracy"

    def compare(self, parsed: str, record: Record) -> float:
        """0 to 1 by thirds."""
        return vqa_accuracy(parsed, record.answers)


class ContainsAnswer(FileTask):
    """Right when a right answer stands somewhere in the answer."""

    metric = "contains"

    def compare(self, parsed: str, record: Record) -> float:
        """1 or 0."""
        return contains_answer(parsed, record.answers)


class Choice(FileTask):
    """One of several options: hint, question, options with letters, and the request to select."""

    metric = "choice"

    def prompt(self, record: Record) -> str:
        """As VLMEvalKit asks."""
        hint = f"Hint: {record.fields['hint']}\n" if "hint" in record.fields else ""
        options = "".join(f"{letter}. {text}\n" for letter, text in record.options.items())
        return f"{hint}Question: {record.question}\n" + (f"Options:\n{options}{SELECT}" if options else "")

    def parse(self, record: Record, answer: str) -> str | None:
        """The letter."""
        return parse_choice(answer, record.options)

    def compare(self, parsed: str, record: Record) -> float:
        """1 or 0."""
        return float(parsed == record.answers[0])


class YesNo(FileTask):
    """Yes or no."""

    metric = "yes_no"

    def parse(self, record: Record, answer: str) -> str | None:
        """Yes, No, or None where both or neither are said."""
        return parse_yes_no(answer)

    def compare(self, parsed: str, record: Record) -> float:
        """1 or 0."""
        return float(parsed.lower() == record.answers[0].strip().lower())


@dataclass
class Captions(FileTask):
    """Captions of pictures against several references each.

    Args:
        tokenizer: "raw" as VLMEvalKit, "ptb" as the official COCO scores.
    """

    tokenizer: str = "ptb"
    metric: ClassVar[str] = "captions"

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer={self.tokenizer!r} is none of {', '.join(TOKENIZERS)}.")

    def facts(self) -> dict[str, Any]:
        """With the tokenizer, which is part of the score."""
        return {**super().facts(), "tokenizer": self.tokenizer}

    def score(self, record: Record, parsed: str | None) -> float:
        """ROUGE-L of this caption; CIDEr and BLEU exist for the whole set alone."""
        words = TOKENIZERS[self.tokenizer]
        return rouge_l(words(parsed or ""), [words(text) for text in record.answers])

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """CIDEr first, then BLEU-1, BLEU-4 and ROUGE-L."""
        words = TOKENIZERS[self.tokenizer]
        captions = [words(entry.answer) for entry in judged]
        references = [[words(text) for text in entry.record.answers] for entry in judged]
        each = mean_metric("CIDEr", cider(captions, references), self.scale)
        suffix = "" if self.tokenizer == "raw" else f" ({self.tokenizer})"
        counts = bleu_counts(captions, references)
        found = [replace(each, scale="from 0", error_note=each.error_note or "n-gram rarities taken as given")]
        for size in (1, LONGEST):
            value = bleu(counts)[size - 1] * self.scale
            error = bootstrap_error(lambda drawn, size=size: bleu(counts[drawn])[size - 1], len(counts))  # type: ignore[misc]
            scaled = None if error is None else error * self.scale
            note = "one caption has no spread" if error is None else "bootstrap over captions"
            found.append(Metric(f"BLEU-{size}", value, f"0..{self.scale:g}", len(counts), scaled, note, False))
        found.append(mean_metric("ROUGE-L", [entry.score for entry in judged], self.scale, is_primary=False))
        return [replace(metric, name=metric.name + suffix) for metric in found]


KINDS: dict[str, type[FileTask]] = {
    kind.metric: kind
    for kind in (ExactMatch, Choice, YesNo, Anls, RelaxedAccuracy, VqaAccuracy, ContainsAnswer, Captions)
}


def guess_metric(records: Sequence[Record]) -> str:
    """The metric that the data of a task ask for: choice with options, yes_no, vqa_accuracy with many answers."""
    if all(record.options for record in records):
        return Choice.metric
    if all(record.answers[0].strip().lower() in ("yes", "no") for record in records):
        return YesNo.metric
    if np.mean([len(record.answers) for record in records]) >= 8:
        return VqaAccuracy.metric
    return ExactMatch.metric

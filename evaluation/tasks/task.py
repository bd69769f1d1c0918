"""A task: records, the prompt of each, what an answer means, what it scores. Every harness asks and scores by these.

    record -> prompt -> (a model) -> answer -> parse -> score -> metrics

`docs/evaluation.md`, "A task of your own", writes one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

RESAMPLES = 400
EXACT_MATCHING = "exact_matching"  # what judges an answer: text alone, never another model


@dataclass(frozen=True)
class ImageData:
    """A picture of a record.

    Args:
        digest: SHA-256 of its bytes.
        read: gives the bytes.
        name: for messages.
    """

    digest: str
    read: Callable[[], bytes] = field(compare=False, repr=False)
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class Record:
    """One question.

    Args:
        index: its name inside the task.
        question: as the data has it, without options or instructions.
        answers: right ones; several where the data has several.
        images: shown in front of the question.
        options: {letter: text} of a choice.
        fields: further columns, as text.
        place: of the record in its file, for messages.
    """

    index: str
    question: str
    answers: tuple[str, ...]
    images: tuple[ImageData, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True)
class Judged:
    """An answer and what became of it: `parsed` is None where the answer says nothing that can be scored."""

    record: Record
    answer: str
    parsed: str | None
    score: float


@dataclass(frozen=True)
class Metric:
    """A number for a whole task.

    Args:
        name: as tables show it.
        value: on `scale`.
        scale: "0..1", "0..100", "0..2800" or, without an upper bound, "from 0".
        count: of what `value` is a mean.
        standard_error: None where there is none, and then `error_note` has the reason.
        error_note: empty where the error is that of a mean over `count` independent questions.
        is_primary: whether it stands for the task in means over tasks.
    """

    name: str
    value: float
    scale: str
    count: int
    standard_error: float | None
    error_note: str = ""
    is_primary: bool = True


@runtime_checkable
class Task(Protocol):
    """What the runner needs of a task.

    `name` names it in results; `max_new_tokens` caps an answer; `facts` goes into the record of the results as it is
    (data file, checksum, preset, split, ...).
    """

    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int: ...

    def records(self) -> Sequence[Record]:
        """Every question."""

    def prompt(self, record: Record) -> str:
        """The text that the language model reads."""

    def question(self, record: Record) -> str:
        """The text that the fusion module reads: the whole prompt, or the bare question."""

    def parse(self, record: Record, answer: str) -> str | None:
        """What an answer says; None where it says nothing that can be scored."""

    def score(self, record: Record, parsed: str | None) -> float:
        """0 to 1."""

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """Numbers for the whole task, the primary one first."""

    def facts(self) -> dict[str, Any]:
        """What the results say about the task: `data_file`, `data_sha256`, `preset`, `split`, `is_official`, ..."""


def judge(task: Task, record: Record, answer: str) -> Judged:
    """Parse and score one answer."""
    parsed = task.parse(record, answer)
    return Judged(record, answer, parsed, float(task.score(record, parsed)))


def mean_metric(name: str, scores: Sequence[float] | np.ndarray, scale: float = 1.0, is_primary: bool = True) -> Metric:
    """A mean over questions and its standard error, both times `scale`.

    Raises:
        ValueError: for no questions.
    """
    if not len(scores):
        raise ValueError(f"{name}: a mean over no questions.")
    values = np.asarray(scores, dtype=np.float64) * scale
    limit = f"0..{scale:g}"
    if len(values) == 1:
        return Metric(name, float(values[0]), limit, 1, None, "one question has no spread", is_primary)
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Metric(name, float(values.mean()), limit, len(values), error, "", is_primary)


def bootstrap_error(statistic: Callable[[np.ndarray], float], count: int, seed: int = 0) -> float | None:
    """Standard deviation of a statistic over samples drawn with replacement (Efron, 1979); None for one unit.

    Args:
        statistic: of the units with these indices, an (n,) array.
        count: units.
        seed: of the draws, so that the same answers give the same error.
    """
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(count, size=count)) for _ in range(RESAMPLES)]
    return float(np.std(values, ddof=1))

"""Ask every question of a task at every m, and keep each answer as soon as it is there.

    <folder>/<task>.journal.jsonl    one line per question and m, on the disk before the next batch is asked

The key of a line is a digest of everything that decides an answer: weights, precision, prompt, question, pictures, m
and cap. A run that was killed goes on where it was; with other weights, prompts or data nothing old is found. With
several processes each writes a journal of its own and reads those of the others.
"""

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fusedvlm.console import progress
from fusedvlm.data.generate.journal import Journal
from fusedvlm.evaluation.tasks.task import Record, Task

from .variant_answers import Asked


class Answerer(Protocol):
    """Whatever answers: `VariantAnswers`, `ServerAnswers`."""

    batch_size: int

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides an answer beside the model, the prompt and m."""

    def answer(self, batch: Sequence[Asked], counts: Sequence[int]) -> list[dict[int, str]]:
        """Answers to each question at each m; an m without an answer is left out."""


@dataclass(frozen=True)
class Share:
    """Which part of the records this process asks: every `ranks`-th."""

    rank: int = 0
    ranks: int = 1


class AnswerRun:
    """The answers of one task.

    Args:
        task: what is asked.
        identity: of the model, in every key.
        counts: numbers of visual tokens.
        folder: of the journals.
        share: this process's part.
    """

    def __init__(
        self, task: Task, identity: str, counts: Sequence[int], folder: Path, share: Share | None = None
    ) -> None:
        self.task, self.identity, self.counts, self.share = task, identity, list(counts), share or Share()
        self.folder = folder
        suffix = "" if self.share.ranks == 1 else f".{self.share.rank}-of-{self.share.ranks}"
        self.path = folder / f"{task.name}{suffix}.journal.jsonl"
        self.asked = {record.index: asked_of(task, record) for record in task.records()}

    def key(self, record: Record, m: int, settings: Mapping[str, Any]) -> str:
        """Name of an answer in the journal."""
        asked = self.asked[record.index]
        parts = [
            self.identity, dict(settings), asked.prompt, asked.question, [image.digest for image in asked.images],
            m, asked.max_new_tokens,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def ask(self, answerer: Answerer, counts: Sequence[int] | None = None) -> None:
        """Ask what has no answer yet.

        Args:
            answerer: answers; its `settings` are part of every key.
            counts: the part of the m that it answers at; all by default.
        """
        wanted = self.counts if counts is None else list(counts)
        records = [record for number, record in enumerate(self.task.records()) if self._is_mine(number)]
        known = self.answers(answerer.settings, wanted)
        total, done = len(records) * len(wanted), 0
        missing: dict[tuple[int, ...], list[Record]] = defaultdict(list)
        for record in in_order_of_images(records):
            left = tuple(m for m in wanted if m not in known[record.index])
            done += len(wanted) - len(left)
            if left:
                missing[left].append(record)
        name = self.task.name if self.share.ranks == 1 else f"{self.task.name}, process {self.share.rank}"
        bar = progress(total=total, initial=done, description=name, unit=" answers", disable=not missing)
        with contextlib.closing(bar), Journal(self.path) as journal:
            for left, waiting in missing.items():
                for start in range(0, len(waiting), answerer.batch_size):
                    part = waiting[start : start + answerer.batch_size]
                    answers = answerer.answer([self.asked[record.index] for record in part], left)
                    journal.add_many(self._entries(part, answers, answerer.settings))
                    bar.update(sum(map(len, answers)))

    def _is_mine(self, number: int) -> bool:
        return number % self.share.ranks == self.share.rank

    def _entries(
        self, records: Sequence[Record], answers: Sequence[Mapping[int, str]], settings: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        for record, by_m in zip(records, answers, strict=True):
            for m, text in by_m.items():
                yield {"key": self.key(record, m, settings), "index": record.index, "m": m, "answer": text}

    def answers(self, settings: Mapping[str, Any], counts: Sequence[int]) -> dict[str, dict[int, str]]:
        """{index: {m: answer}} of everything that any process wrote down."""
        found = {entry["key"]: entry["answer"] for path in self._journals() for entry in read_journal(path)}
        known: dict[str, dict[int, str]] = {}
        for record in self.task.records():
            keys = {m: self.key(record, m, settings) for m in counts}
            known[record.index] = {m: found[key] for m, key in keys.items() if key in found}
        return known

    def _journals(self) -> list[Path]:
        names = [f"{self.task.name}.journal.jsonl", f"{self.task.name}.*-of-*.journal.jsonl"]
        return sorted(path for name in names for path in self.folder.glob(name))


def asked_of(task: Task, record: Record) -> Asked:
    """A record as a model gets it."""
    return Asked(task.prompt(record), task.question(record), record.images, task.max_new_tokens)


def in_order_of_images(records: Sequence[Record]) -> list[Record]:
    """Records about the same picture one after the other, in the order in which pictures come first."""
    first: dict[tuple[str, ...], int] = {}
    for number, record in enumerate(records):
        first.setdefault(tuple(image.digest for image in record.images), number)
    return sorted(records, key=lambda record: first[tuple(image.digest for image in record.images)])


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a journal that another process may be writing; a line that is not whole yet does not count.

    Raises:
        ValueError: naming a line in the middle that is no entry.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                entry["key"], entry["answer"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: damaged; delete the file to ask anew.") from None
            yield entry

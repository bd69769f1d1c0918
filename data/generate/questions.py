"""Yes/no and multiple-choice questions about images, written by a language model from their detailed descriptions."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from operator import length_hint
from pathlib import Path
from typing import IO, Any

import jinja2

from fusedvlm.console import progress, say
from fusedvlm.data.records import text_of
from fusedvlm.data.sample_files import as_json, open_output
from fusedvlm.data.sources.converters import Sample
from fusedvlm.templates import load_template

from .answer_filters import KINDS, Kind, Question, keep_questions, parse_questions
from .journal import Journal
from .llm_client import Ask, Messages
from .parallel_work import Task, run_tasks

FOLDER = Path(__file__).parent
# What is added to a question in training, so that the form of the answer is asked for.
REQUESTS = {"yes_no": "Answer with Yes or No.", "multiple_choice": "Answer with the letter of the right option."}


@dataclass(frozen=True)
class QuestionOptions:
    """How questions are asked for.

    Args:
        kinds: of `filters.KINDS`.
        per_description: questions of each kind per description.
        min_words: shorter descriptions are left out (and counted).
        author: of the answers: model and address; a change asks everything again.
        concurrency: requests at a time.
        retry_declined: ask again for what was refused or cut before.
    """

    kinds: Sequence[Kind] = KINDS
    per_description: int = 4
    min_words: int = 20
    author: str = ""
    concurrency: int = 8
    retry_declined: bool = False

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds {list(self.kinds)} must be some of {', '.join(KINDS)}.")
        if self.per_description < 1 or self.concurrency < 1:
            raise ValueError(
                f"per_description={self.per_description} and concurrency={self.concurrency} must be positive."
            )


def write_questions(
    samples: Iterable[Sample], output: str | Path, ask: Ask | None, options: QuestionOptions
) -> dict[str, Any]:
    """Ask for questions about every described image and keep those in the right form.

    Each answer of the model goes to `<output>.journal` at once. A run that was killed, at any moment, goes on from
    there; then the output is made from the journal anew, so nothing is in it twice. Requests that were refused for
    themselves and replies that were cut are in `<output>.declined.jsonl`, and are not asked again. However many samples
    there are, a few are in memory.

    Args:
        samples: with an image and its description as the last answer (SVIT's detail_description). They are read twice,
            in the same order.
        output: JSON Lines file of samples, one question each (a `chat` source).
        ask: see `fusedvlm.data.generate.llm_client`; None makes the output from the journal alone.
        options: what kinds of questions, how many, and what their answers must be like.

    Returns:
        The report: descriptions, questions kept by kind, dropped by kind and reason, balance of the answers, requests
        that were refused, cut, or stayed without an answer.

    Raises:
        ValueError: when no sample has an image and a description, or the endpoint refuses.
        Unanswered: when the endpoint is silent.
    """
    samples = read_again(samples)
    with Journal(f"{output}.journal") as journal:
        if options.retry_declined:
            journal.forget("refused", "cut")
        if ask is not None:
            tasks = (make_task(sample, kind, ask, options) for sample, kind in requests_of(samples, options))
            total = length_hint(samples) * len(options.kinds) or None
            on_stop = getattr(ask, "cancel", None)
            run_tasks(tasks, journal, options.concurrency, "Asking for questions", total, on_stop)
        report = collect(samples, output, journal, options)
    warn_of_imbalance(report["answers"])
    return plain(report)


def read_again(samples: Iterable[Sample]) -> Iterable[Sample]:
    """Samples that can be read twice; what can be read once only is taken into memory."""
    return list(samples) if iter(samples) is samples else samples


def requests_of(samples: Iterable[Sample], options: QuestionOptions) -> Iterator[tuple[Sample, Kind]]:
    """What is asked: every described sample, once for each kind of question."""
    ignored: Counter = Counter()
    for sample in samples:
        if is_described(sample, options.min_words, ignored):
            yield from ((sample, kind) for kind in options.kinds)


def prompts_of(samples: Iterable[Sample], options: QuestionOptions) -> Iterator[tuple[str, Messages]]:
    """Key and conversation of every request, for `offline_batch`."""
    for sample, kind in requests_of(samples, options):
        prompt = prompt_for(sample, kind, options.per_description)
        yield task_key(options.author, prompt), [{"role": "user", "content": prompt}]


def collect(
    samples: Iterable[Sample], output: str | Path, journal: Journal, options: QuestionOptions
) -> dict[str, Any]:
    """Write the questions of all answers in the journal, and count.

    Raises:
        ValueError: when no sample has an image and a description.
    """
    report: dict[str, Any] = {
        "descriptions": 0,
        "left_out": Counter(),
        "unanswered": 0,
        "refused": 0,
        "cut": 0,
        "kept": Counter(),
        "dropped": {kind: Counter() for kind in options.kinds},
        "answers": {kind: Counter() for kind in options.kinds},
    }
    with open_output(output) as file, declined_file(output) as declined:
        for sample in progress(samples, "Writing questions", length_hint(samples) or None):
            if not is_described(sample, options.min_words, report["left_out"]):
                continue
            report["descriptions"] += 1
            for row in questions_of(sample, journal, options, report, declined):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not report["descriptions"]:
            left_out = dict(report["left_out"])
            raise ValueError(f"No sample has an image and a description of {options.min_words} words: {left_out}.")
    return report


class DeclinedFile:
    """Lists what got no usable reply, in a file that is there only when there is any."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.count = file, 0

    def add(self, sample: Sample, entry: dict[str, Any], **more: str) -> None:
        """Note one request."""
        self.count += 1
        row = {"id": sample["id"], **more, "why": entry["kind"], "detail": entry["detail"]}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def declined_file(output: str | Path) -> Iterator[DeclinedFile]:
    """`<output>.declined.jsonl`, whole or not there."""
    path = Path(f"{output}.declined.jsonl")
    with open_output(path) as file:
        declined = DeclinedFile(file)
        yield declined
    if not declined.count:
        path.unlink()


def plain(report: Any) -> Any:
    """Counters as dictionaries, in a fixed order."""
    if isinstance(report, dict):
        items = sorted(report.items()) if isinstance(report, Counter) else report.items()
        return {key: plain(value) for key, value in items}
    return report


def is_described(sample: Sample, min_words: int, left_out: Counter) -> bool:
    """Whether questions can be made of a sample; else the reason is counted."""
    if len(sample["images"]) != 1:
        left_out["not one image"] += 1
        return False
    if len(description_of(sample).split()) < min_words:
        left_out["description too short"] += 1
        return False
    return True


def description_of(sample: Sample) -> str:
    """The last answer of a sample."""
    return text_of(sample["messages"][-1])


@cache
def template(kind: Kind) -> jinja2.Template:
    """The prompt that asks for questions of a kind."""
    return load_template(FOLDER / f"questions_{kind}.jinja")


def prompt_for(sample: Sample, kind: Kind, count: int) -> str:
    """What the model is asked about a sample."""
    return template(kind).render(description=description_of(sample), count=count).removesuffix("\n")


def make_task(sample: Sample, kind: Kind, ask: Ask, options: QuestionOptions) -> Task:
    """The request for a sample's questions, named after all that its answer depends on."""
    prompt = prompt_for(sample, kind, options.per_description)
    return Task(task_key(options.author, prompt), partial(_reply, ask, prompt), label=f"{sample['id']} ({kind})")


def task_key(*parts: str) -> str:
    """A short name for texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _reply(ask: Ask, prompt: str) -> dict[str, str]:
    return {"reply": ask([{"role": "user", "content": prompt}])}


def questions_of(
    sample: Sample, journal: Journal, options: QuestionOptions, report: dict[str, Any], declined: DeclinedFile
) -> Iterator[dict[str, Any]]:
    """Samples of all kept questions about one; counts go to the report."""
    for kind in options.kinds:
        entry = journal.get(task_key(options.author, prompt_for(sample, kind, options.per_description)))
        if entry is None:
            report["unanswered"] += 1
            continue
        if entry["kind"] != "answer":
            report[entry["kind"]] += 1
            declined.add(sample, entry, question=kind)
            continue
        found = parse_questions(kind, entry["reply"])
        kept, dropped = keep_questions(found)
        if not found:
            dropped["no question in the reply"] += 1
        report["dropped"][kind] += dropped
        report["kept"][kind] += len(kept)
        report["answers"][kind] += Counter(question.answer for question in kept)
        for number, question in enumerate(kept):
            yield question_sample(sample, question, number)


def question_sample(sample: Sample, question: Question, number: int) -> dict[str, Any]:
    """A training sample of one question."""
    options = [f"{letter}. {text}" for letter, text in question.options]
    text = "\n".join([question.text, *options, REQUESTS[question.kind]])
    return {
        "id": f"{sample['id']}-{question.kind}-{number}",
        "source": f"questions from {sample['source']}",
        "images": as_json(sample)["images"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        ],
    }


def warn_of_imbalance(answers: dict[str, Counter], factor: float = 1.5) -> None:
    """Say when one answer is much more frequent than it would be by chance: a model learns that first."""
    for kind, counts in answers.items():
        expected = sum(counts.values()) / {"yes_no": 2, "multiple_choice": 4}[kind]
        for answer, count in counts.items():
            if count > factor * expected and count >= 10:
                say(f"{kind}: {count} of {sum(counts.values())} answers are {answer}; the questions are not balanced.")

"""Tasks, weights and numbers of visual tokens to results: ask, judge, count what cannot be read, write it all down."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fusedvlm
from fusedvlm.console import say
from fusedvlm.costs.environment import Environment, describe_environment
from fusedvlm.evaluation.results import LOCAL, EvaluationResults, ScoreSource, TaskScore
from fusedvlm.evaluation.tasks.task import EXACT_MATCHING, Judged, Metric, Task, judge
from fusedvlm.files import sha256_of

from .answer_files import write_answers
from .answer_run import Answerer, AnswerRun, Share

SHOWN = 3  # answers that cannot be read, shown for each task
ANSWERS = "evaluation"  # folder of journals and answers, beside the results
ALONE = Share()


@dataclass(frozen=True)
class Asking:
    """Who answers at which m: an answerer, and the identity of its model.

    Args:
        answerer: answers.
        model, commit: name and commit of the model, for records and keys.
        counts: numbers of visual tokens.
        address: of a server; part of the keys, and of no record.
    """

    answerer: Answerer
    model: str
    commit: str
    counts: tuple[int, ...]
    address: str = ""

    @property
    def identity(self) -> str:
        """Of the model, in every key of the journal."""
        return self.commit or f"{self.model} at {self.address}"


@runtime_checkable
class ScoredElsewhere(Protocol):
    """A task whose answers another tool scores."""

    @property
    def harness(self) -> tuple[str, str]:
        """Its name and version."""

    def score_rows(self, answers: Mapping[int, Mapping[str, str]], source: str, note: str) -> list[TaskScore]:
        """Rows for answers {m: {index: text}}."""


@dataclass
class Evaluation:
    """What a run gave.

    Args:
        results: of every task that could be scored.
        unread: the first unreadable answers of each task, for people.
        problems: tasks that could not be scored, and why; the others' scores stand.
    """

    results: EvaluationResults
    unread: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def collect(task: Task, part: Asking, folder: Path) -> dict[int, list[Judged]]:
    """Judge everything that any process wrote down.

    Raises:
        RuntimeError: when answers are missing, saying how many.
    """
    run = AnswerRun(task, part.identity, part.counts, folder)
    known = run.answers(part.answerer.settings, part.counts)
    missing = sum(m not in known[record.index] for record in task.records() for m in part.counts)
    if missing:
        raise RuntimeError(
            f"{task.name}: {missing} of {len(known) * len(part.counts)} answers are missing; run the same command "
            "again to ask for them. Nothing was scored."
        )
    return {m: [judge(task, record, known[record.index][m]) for record in task.records()] for m in part.counts}


def silence(task: Task, judged: Mapping[int, Sequence[Judged]]) -> Iterator[str]:
    """Every m at which all answers are empty: that is no score of zero, something is wrong."""
    for m, entries in judged.items():
        if entries and not any(entry.answer.strip() for entry in entries):
            yield (
                f"{task.name}: all {len(entries)} answers at m={m} are empty. The weights, the chat template or the "
                f"cap of {task.max_new_tokens} tokens are wrong; it was not scored."
            )


def score_rows(task: Task, judged: Mapping[int, Sequence[Judged]], source: str, note: str) -> list[TaskScore]:
    """A row for every metric and m; of a task that another tool scores, what that says."""
    if isinstance(task, ScoredElsewhere):
        return task.score_rows(
            {m: {entry.record.index: entry.answer for entry in judged[m]} for m in judged}, source, note
        )
    rows = []
    for m in sorted(judged):
        unparsed = [entry for entry in judged[m] if entry.parsed is None]
        empty = sum(not entry.answer.strip() for entry in unparsed)
        for metric in task.metrics(judged[m]):
            rows.append(_row(task, m, metric, source, note, len(unparsed), empty))
    return rows


def _row(task: Task, m: int, metric: Metric, source: str, note: str, unparsed: int, empty: int) -> TaskScore:
    return TaskScore(
        task.name, m, metric.value, metric.count, metric.standard_error, metric=metric.name, scale=metric.scale,
        harness=LOCAL, note=note, is_primary=metric.is_primary, error_note=metric.error_note, unparsed=unparsed,
        empty=empty, source=source,
    )  # fmt: skip


def single_scores(row: TaskScore, judged: Sequence[Judged]) -> list[float]:
    """Scores of single questions whose mean the row is, on its scale; empty where it is none."""
    values = [entry.score * (row.maximum or 1.0) for entry in judged]
    is_theirs = row.is_mean and row.count == len(values) and abs(sum(values) / len(values) - row.score) < 1e-9
    return values if is_theirs else []


def note_of(facts: Mapping[str, Any]) -> str:
    """What sets a score apart from the benchmark's own."""
    parts = []
    if facts.get("is_official") is False:
        parts.append("not the official data")
    if facts.get("limit") is not None:
        parts.append(f"first {facts['limit']}")
    if facts.get("question") == "bare question":
        parts.append("bare question")
    return ", ".join(parts)


def source_of(task: Task, part: Asking, answers: Path | None, environment: Environment) -> ScoreSource:
    """All that is needed to make a task's scores again."""
    facts = dict(task.facts())
    known = {name: facts.pop(name, "") or "" for name in ("preset", "data_file", "data_sha256", "split")}
    is_official = facts.pop("is_official", None)
    harness, version = task.harness if isinstance(task, ScoredElsewhere) else (LOCAL, fusedvlm.__version__)
    return ScoreSource(
        harness=harness,
        harness_version=version,
        judge=EXACT_MATCHING,
        model=part.model.rstrip("/").rpartition("/")[2] if Path(part.model).exists() else part.model,
        model_commit=part.commit,
        is_official=is_official,
        answers_file="" if answers is None else f"{ANSWERS}/{answers.name}",
        answers_sha256="" if answers is None else sha256_of(answers),
        settings={**{name: value for name, value in facts.items() if value is not None}, **part.answerer.settings},
        environment=environment,
        **known,
    )


def evaluate_tasks(
    tasks: Sequence[Task],
    asking: Sequence[Asking],
    output: Path,
    command: str,
    share: Share = ALONE,
    wait: Callable[[], None] = lambda: None,
) -> Evaluation | None:
    """Ask and score every task.

    Args:
        tasks: what is asked.
        asking: who answers at which m.
        output: folder that gets `evaluation/` with journals and answers.
        command: that is running, for the record.
        share: this process's part of the records; with several processes the first one scores.
        wait: returns when every process has asked its part.

    Returns:
        Results, None for a process that only asks.

    Raises:
        ValueError: for damaged data, tasks of one name, or answers that are all empty.
        RuntimeError: when answers are missing.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"Two tasks are called {next(n for n in names if names.count(n) > 1)!r}; rename a file.")
    folder = output / ANSWERS
    for task in tasks:
        task.records()  # what is damaged is found before the first question is asked
    for task in tasks:
        for part in asking:
            AnswerRun(task, part.identity, part.counts, folder, share).ask(part.answerer)
    wait()
    if share.rank != 0:
        return None
    return score_tasks(tasks, asking, folder, describe_environment(command))


def score_tasks(tasks: Sequence[Task], asking: Sequence[Asking], folder: Path, environment: Environment) -> Evaluation:
    """Results of answers that are all there."""
    evaluation = Evaluation(EvaluationResults(environment))
    for task in tasks:
        judged: dict[int, list[Judged]] = {}
        for part in asking:
            judged.update(collect(task, part, folder))
        evaluation.problems += silence(task, judged)
        if any(silence(task, judged)):
            continue
        note = note_of(task.facts())
        for part in asking:
            own = {m: judged[m] for m in part.counts}
            # Named by what decides the answers: other settings, or other m, leave this file and its scores alone.
            about = [
                part.identity,
                type(task).__name__,
                sorted(part.counts),
                dict(task.facts()),
                dict(part.answerer.settings),
            ]
            source = f"{task.name}.{hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:8]}"
            path = folder / f"{source}.answers.jsonl.gz"
            write_answers(path, own)
            evaluation.results.sources[source] = source_of(task, part, path, environment)
            rows = score_rows(task, own, source, note)
            evaluation.results.scores += rows
            for row in rows:
                single = single_scores(row, own[row.num_visual_tokens])
                if single:
                    evaluation.results.question_scores.setdefault(row.label, {})[row.num_visual_tokens] = single
        evaluation.unread[task.name] = [] if isinstance(task, ScoredElsewhere) else _unread(judged)
    return evaluation


def _unread(judged: Mapping[int, Sequence[Judged]]) -> list[str]:
    """The first answers that say nothing, each once."""
    found: dict[str, None] = {}
    for m in sorted(judged):
        for entry in judged[m]:
            if entry.parsed is None and entry.answer.strip():
                found.setdefault(f"{entry.answer[:60]!r} to {entry.record.question[:60]!r} at m={m}")
    return list(found)[:SHOWN]


def say_unread(evaluation: Evaluation) -> None:
    """Tell people how many answers could not be read, and show some."""
    by_task: dict[str, int] = {}
    for row in evaluation.results.scores:
        if row.is_primary:
            by_task[row.task] = by_task.get(row.task, 0) + row.unparsed
    for task, count in by_task.items():
        if count:
            say(f"{task}: {count} answers say nothing that can be scored, and count as wrong; for example:")
            for line in evaluation.unread[task]:
                say(f"  {line}")

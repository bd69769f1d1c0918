"""Typed records of what was measured, and where; the only source of numbers for reports and cards."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fusedvlm.costs.environment import Environment
from fusedvlm.files import read_json, write_json
from fusedvlm.plain_data import build
from fusedvlm.question_scores import read_question_scores, write_question_scores

LOCAL = "local"  # the harness that is this package's own


@dataclass(frozen=True)
class TaskScore:
    """Score of one task by one metric at one number of visual tokens.

    Args:
        task, num_visual_tokens, metric, harness, note: together name the score; no two rows of a file have all alike.
        score: on `scale`.
        count: of what the score is a mean: held-out questions, or groups of them.
        standard_error: None where there is none; `error_note` says why.
        scale: "0..1", "0..100", "0..2800", or "from 0" without an upper bound; empty in files older than the field.
        harness: whose prompts and scoring these are; empty in files older than the field.
        note: what else a reader must know beside the number: "first 100 questions", "not the official data".
        is_primary: whether the row stands for its task in means over tasks.
        error_note: empty where the error is that of a mean over `count` questions.
        unparsed, empty: answers that said nothing that can be scored, and those of them without a word.
        source: key into `EvaluationResults.sources`.
    """

    task: str
    num_visual_tokens: int
    score: float
    count: int
    standard_error: float | None
    metric: str = "score"
    scale: str = ""
    harness: str = ""
    note: str = ""
    is_primary: bool = True
    error_note: str = ""
    unparsed: int = 0
    empty: int = 0
    source: str = ""

    @property
    def label(self) -> str:
        """Name of the column that shows it: the task, the metric where it has a name, and what sets it apart."""
        metric = "" if self.metric == "score" else f" {self.metric}"
        harness = "" if self.harness in ("", LOCAL) else f" [{self.harness}]"
        note = f" ({self.note})" if self.note else ""
        return f"{self.task}{metric}{harness}{note}"

    @property
    def key(self) -> tuple[str, int]:
        """What makes a row the only one of its kind."""
        return self.label, self.num_visual_tokens

    @property
    def maximum(self) -> float | None:
        """Upper end of the scale; None where there is none, 1 in files older than the field."""
        if not self.scale:
            return 1.0
        return float(self.scale.rpartition("..")[2]) if ".." in self.scale else None

    @property
    def is_mean(self) -> bool:
        """Whether the error is that of a mean over `count` independent questions."""
        return self.standard_error is not None and not self.error_note


@dataclass(frozen=True)
class Latency:
    """Seconds per question at one number of visual tokens: median over `count` repeats.

    Args:
        peak_memory_bytes: largest memory of the accelerator, or of the process where there is none.
        tokens_per_second: of the answer behind its first token.
        utilization: share of time in which the accelerator computed; None where there is none.
    """

    num_visual_tokens: int
    time_to_first_token: float
    seconds_per_answer: float
    count: int
    peak_memory_bytes: int | None = None
    tokens_per_second: float | None = None
    utilization: float | None = None


@dataclass(frozen=True)
class ScoreSource:
    """Where scores come from: all that is needed to make them again.

    Args:
        harness, harness_version: whose prompts and scoring.
        preset: name of the prompts and caps of answers.
        judge: what decides whether an answer is right: "exact_matching" is text alone.
        model, model_commit: folder's or repository's name; commit, or digest of the files that decide its answers.
        data_file, data_sha256, split, is_official: the questions; `is_official` is None where nobody published any.
        answers_file, answers_sha256: every question's answer and score, in a compressed file beside the results.
        settings: whatever else decided the answers.
        environment: of this run.
    """

    harness: str
    harness_version: str
    preset: str = ""
    judge: str = ""
    model: str = ""
    model_commit: str = ""
    data_file: str = ""
    data_sha256: str = ""
    split: str = ""
    is_official: bool | None = None
    answers_file: str = ""
    answers_sha256: str = ""
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    environment: Environment | None = None


@dataclass
class EvaluationResults:
    """Everything that was measured of a variant or a family; `sources` are named by the scores that come from them.

    `question_scores` are those behind the means, {label: {m: one score per question}}, the same questions in the same
    order at every m. They are kept in a file of their own beside the results, see `fusedvlm.question_scores`.
    """

    environment: Environment
    scores: list[TaskScore] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    question_scores: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    sources: dict[str, ScoreSource] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write JSON, atomically: a killed run leaves no half file. Unused newer fields are left out."""
        write_question_scores(path, self.question_scores)
        write_json(path, plain_results(self))

    @classmethod
    def load(cls, path: Path) -> "EvaluationResults":
        """Read what `save` wrote, with the scores of single questions where they were kept.

        Raises:
            ValueError: naming the file, when something is missing, or the single scores do not give the means.
        """
        try:
            results = build(cls, read_json(path), "results")
        except ValueError as error:
            raise ValueError(f"{path}: not a results file ({error}).") from None
        results.question_scores = read_question_scores(path, {row.key: row.score for row in results.scores})
        return results

    def joined(self, new: "EvaluationResults") -> "EvaluationResults":
        """These results with newer ones: a score of the same name and m is replaced, everything else stays."""
        keys, counts = {row.key for row in new.scores}, {row.num_visual_tokens for row in new.latencies}
        scores = [row for row in self.scores if row.key not in keys] + new.scores
        latencies = [row for row in self.latencies if row.num_visual_tokens not in counts] + new.latencies
        named = {row.source for row in scores}
        sources = {name: source for name, source in {**self.sources, **new.sources}.items() if name in named}
        ordered = sorted(latencies, key=lambda row: row.num_visual_tokens)
        single: dict[str, dict[int, list[float]]] = {}
        for results in (self, new):
            for row in results.scores:
                values = results.question_scores.get(row.label, {}).get(row.num_visual_tokens)
                if results is new or row.key not in keys:
                    single.setdefault(row.label, {}).update({} if values is None else {row.num_visual_tokens: values})
        single = {label: by_m for label, by_m in single.items() if by_m}
        return replace(self, scores=scores, latencies=ordered, sources=sources, question_scores=single)


def plain_results(results: EvaluationResults) -> dict[str, Any]:
    """As JSON has it: fields that are at their defaults are left out of scores, latencies and sources."""
    document = asdict(replace(results, question_scores={}))
    del document["question_scores"]
    for name, kind in (("scores", TaskScore), ("latencies", Latency)):
        document[name] = [_stated(kind, row) for row in document[name]]
    document["sources"] = {key: _stated(ScoreSource, source) for key, source in document["sources"].items()}
    if not document["sources"]:
        del document["sources"]
    return document


def _stated(kind: Any, row: dict[str, Any]) -> dict[str, Any]:
    defaults = {name: entry.default for name, entry in kind.__dataclass_fields__.items()}
    return {name: value for name, value in row.items() if value != defaults[name] or name == "standard_error"}

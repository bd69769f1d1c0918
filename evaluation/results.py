"""Typed records of what was measured, and where; the only source of numbers for reports and cards."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusedvlm.costs.environment import Environment
from fusedvlm.files import read_json, write_json
from fusedvlm.plain_data import build
from fusedvlm.question_scores import read_question_scores, write_question_scores


@dataclass(frozen=True)
class TaskScore:
    """Mean score of one task at one number of visual tokens, over `count` held-out questions."""

    task: str
    num_visual_tokens: int
    score: float
    count: int
    standard_error: float


@dataclass(frozen=True)
class Latency:
    """Seconds per question at one number of visual tokens: median over `count` repeats."""

    num_visual_tokens: int
    time_to_first_token: float
    seconds_per_answer: float
    count: int


@dataclass
class EvaluationResults:
    """Everything one evaluation run measured.

    `question_scores` are those behind the means, {task: {m: one score per question}}, the same questions in the same
    order at every m. They are kept in a file of their own beside the results, see `fusedvlm.question_scores`.
    """

    environment: Environment
    scores: list[TaskScore] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    question_scores: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write JSON, atomically: a killed run leaves no half file."""
        document = asdict(self)
        write_question_scores(path, document.pop("question_scores"))
        write_json(path, document)

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
        means = {(score.task, score.num_visual_tokens): score.score for score in results.scores}
        results.question_scores = read_question_scores(path, means)
        return results

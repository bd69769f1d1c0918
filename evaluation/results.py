"""Typed records of what was measured, and where; the only source of numbers for reports and cards."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusedvlm.costs.environment import Environment
from fusedvlm.files import read_json, write_json
from fusedvlm.plain_data import build


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
    """Everything one evaluation run measured."""

    environment: Environment
    scores: list[TaskScore] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write JSON, atomically: a killed run leaves no half file."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "EvaluationResults":
        """Read what `save` wrote. Raises `ValueError` naming the file when something is missing."""
        try:
            return build(cls, read_json(path), "results")
        except ValueError as error:
            raise ValueError(f"{path}: not a results file ({error}).") from None

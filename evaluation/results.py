"""Typed records of what was measured, and where; the only source of numbers for reports and cards."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusedvlm.costs.environment import Environment
from fusedvlm.files import write_atomically


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
        write_atomically(path, json.dumps(asdict(self), indent=2, allow_nan=False))

    @classmethod
    def load(cls, path: Path) -> "EvaluationResults":
        """Read what `save` wrote. Raises `ValueError` naming the file when something is missing."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                Environment(**data["environment"]),
                [TaskScore(**row) for row in data["scores"]],
                [Latency(**row) for row in data["latencies"]],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a results file ({error}).") from error

"""Asking questions, scoring answers, and typed records of what was measured."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

_PUBLIC = {
    "Environment": "fusedvlm.costs.environment",
    "EvaluationResults": ".results",
    "Latency": ".results",
    "ScoreSource": ".results",
    "TaskScore": ".results",
    "answer_questions": ".runner",
    "describe_environment": "fusedvlm.costs.environment",
    "measure_latencies": ".runner",
    "summarize": ".runner",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from fusedvlm.costs.environment import (
        Environment as Environment,
        describe_environment as describe_environment,
    )

    from .results import (
        EvaluationResults as EvaluationResults,
        Latency as Latency,
        ScoreSource as ScoreSource,
        TaskScore as TaskScore,
    )
    from .runner import (
        answer_questions as answer_questions,
        measure_latencies as measure_latencies,
        summarize as summarize,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

"""Asking questions, scoring answers, and typed records of what was measured."""

from fusedvlm.costs.environment import Environment, describe_environment

from .results import EvaluationResults, Latency, TaskScore
from .runner import answer_questions, measure_latencies, summarize

__all__ = [
    "Environment",
    "EvaluationResults",
    "Latency",
    "TaskScore",
    "answer_questions",
    "describe_environment",
    "measure_latencies",
    "summarize",
]

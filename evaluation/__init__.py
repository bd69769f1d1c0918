"""Asking questions, scoring answers, and typed records of what was measured."""

from .results import Environment, EvaluationResults, Latency, TaskScore, describe_environment
from .runner import answer_questions, measure_latencies, summarise

__all__ = [
    "Environment",
    "EvaluationResults",
    "Latency",
    "TaskScore",
    "answer_questions",
    "describe_environment",
    "measure_latencies",
    "summarise",
]

"""Scores of single questions, kept beside a results file: `results.questions.json` beside `results.json`.

They are what a bootstrap over questions needs, and too many for a file that people read.
"""

from collections.abc import Mapping
from pathlib import Path

from fusedvlm.files import read_json, write_json
from fusedvlm.plain_data import build

ENDING = ".questions.json"
QuestionScores = dict[str, dict[int, list[float]]]  # {task: {m: one score per question, in the same order at every m}}


def questions_file(results: str | Path) -> Path:
    """Where the scores of single questions behind a results file are kept.

    >>> questions_file("family/results.json").name
    'results.questions.json'
    """
    return Path(results).with_name(Path(results).stem + ENDING)


def write_question_scores(results: str | Path, scores: QuestionScores) -> None:
    """Write them beside a results file, before it; without any, those of earlier results go."""
    if scores:
        write_json(questions_file(results), scores, indent=None)
    else:
        questions_file(results).unlink(missing_ok=True)


def read_question_scores(results: str | Path, means: Mapping[tuple[str, int], float]) -> QuestionScores:
    """Those behind a results file; empty where none were kept.

    Args:
        results: the file they lie beside.
        means: {(task, m): score} it states.

    Raises:
        ValueError: when the file is damaged, or does not give those means: then it belongs to other results.
    """
    path = questions_file(results)
    if not path.exists():
        return {}
    found = build(dict[str, dict[str, list[float]]], read_json(path), str(path))
    try:
        kept = {task: {int(m): values for m, values in by_m.items()} for task, by_m in found.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None
    for task, by_m in kept.items():
        for m, values in by_m.items():
            stated = means.get((task, m))
            if stated is None or not values or abs(sum(values) / len(values) - stated) > 1e-6:
                raise ValueError(
                    f"{path}: {task} at m={m} does not give the mean that {Path(results).name} states; delete it, or "
                    "evaluate again."
                )
    return kept

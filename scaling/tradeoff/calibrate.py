"""Fit what chooses m from a question alone, and measure on held-out questions what it saves and what it loses."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusedvlm.files import parse_json, read_json, write_json
from fusedvlm.processing.processing_fusedvlm_auto import QuestionCalibration, words_of

FAMILY_FILE = Path("measured") / "question_scores.jsonl"  # of a family folder
SAVES, LOSES = 0.30, 0.01  # the least share of visual tokens and the most score that make it worth having
RIDGE = 1.0
CODE = "processing_fusedvlm_auto.py"  # which a variant's folder must bring to choose by itself


@dataclass(frozen=True)
class AskedQuestion:
    """A question, and what was scored on it at each m."""

    question: str
    scores: dict[int, float]


@dataclass(frozen=True)
class Saving:
    """What a calibration does to questions it was not fitted to.

    `loss` is the mean score at the largest m minus that at the chosen one, `loss_error` its standard error over the
    questions; `saved` the share of visual tokens; `chosen` how many questions got each m; `fixed` the mean score of
    every m given to all.
    """

    questions: int
    largest: int
    score: float
    loss: float
    loss_error: float
    mean_tokens: float
    saved: float
    chosen: dict[int, int]
    fixed: dict[int, float]

    @property
    def is_worth_it(self) -> bool:
        """Whether it saves enough and loses little enough."""
        return self.saved >= SAVES and self.loss <= LOSES


def read_asked_questions(source: str | Path) -> list[AskedQuestion]:
    """Rows of JSON lines {"question": text, "scores": {"1": 0.5, "8": 1.0}}; further fields are left alone.

    Args:
        source: the file, or a family folder that has one (`measured/question_scores.jsonl`).

    Raises:
        ValueError: naming the row that lacks something, or was scored at other m than the first.
    """
    path = Path(source)
    if path.is_dir():
        path = path / FAMILY_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give JSON lines of questions and their scores at each m.")
    rows: list[AskedQuestion] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(_asked(parse_json(line, where), where))
            if rows[-1].scores.keys() != rows[0].scores.keys():
                raise ValueError(
                    f"{where}: scored at m = {sorted(rows[-1].scores)}, others at {sorted(rows[0].scores)}."
                )
    if len(rows) < 20 or len(rows[0].scores) < 2:
        counts = len(rows[0].scores) if rows else 0
        raise ValueError(f"{path}: {len(rows)} questions at {counts} m; a calibration needs 20 and 2 at least.")
    return rows


def _asked(row: Any, where: str) -> AskedQuestion:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not isinstance(row.get("scores"), dict):
        raise ValueError(f'{where}: needs "question" (text) and "scores" ({{m: score}}).')
    try:
        scores = {int(m): float(score) for m, score in row["scores"].items()}
    except (TypeError, ValueError):
        raise ValueError(f"{where}: scores {str(row['scores'])[:80]} are not numbers by number of tokens.") from None
    if not all(np.isfinite(list(scores.values()))) or min(scores, default=0) < 1:
        raise ValueError(f"{where}: scores {str(row['scores'])[:80]} need finite values at m from 1 on.")
    return AskedQuestion(row["question"], dict(sorted(scores.items())))


def fit_calibration(rows: Sequence[AskedQuestion], tolerance: float = 0.01, known_share: float = 0.5) -> dict[str, Any]:
    """Ridge regression of the score at every m on the words of a question; plain data for `QuestionCalibration`.

    Args:
        rows: calibration questions.
        tolerance: expected loss at which a smaller m is still chosen.
        known_share: of a question's words that must be known, else it gets the largest m.
    """
    counts = sorted(rows[0].scores)
    words = sorted({word for row in rows for word in words_of(row.question)})
    place = {word: index for index, word in enumerate(words)}
    design = np.zeros((len(rows), len(words)))
    for number, row in enumerate(rows):
        design[number, [place[word] for word in words_of(row.question)]] = 1
    scores = np.array([[row.scores[m] for m in counts] for row in rows])
    center, mean = design.mean(0), scores.mean(0)
    moved = design - center
    weights = np.linalg.solve(moved.T @ moved + RIDGE * np.eye(len(words)), moved.T @ (scores - mean))
    return {
        "counts": counts,
        "bias": [round(float(value), 6) for value in mean - center @ weights],
        "words": {word: [round(float(value), 6) for value in weights[index]] for word, index in place.items()},
        "tolerance": tolerance,
        "known_share": known_share,
        "questions": len(rows),
    }


def measure_saving(record: dict[str, Any], rows: Sequence[AskedQuestion]) -> Saving:
    """What a calibration does to questions."""
    calibration = QuestionCalibration(record)
    chosen = [calibration.choose(row.question) for row in rows]
    largest = calibration.counts[-1]
    losses = np.array([row.scores[largest] - row.scores[m] for row, m in zip(rows, chosen, strict=True)])
    tokens = float(np.mean(chosen))
    return Saving(
        questions=len(rows),
        largest=largest,
        score=float(np.mean([row.scores[m] for row, m in zip(rows, chosen, strict=True)])),
        loss=float(losses.mean()),
        loss_error=float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else 0.0,
        mean_tokens=tokens,
        saved=1 - tokens / largest,
        chosen=dict(sorted(Counter(chosen).items())),
        fixed={m: float(np.mean([row.scores[m] for row in rows])) for m in calibration.counts},
    )


def calibrate(
    rows: Sequence[AskedQuestion], tolerance: float = 0.01, held_out: float = 0.5, seed: int = 0
) -> tuple[dict[str, Any], Saving]:
    """Fit to one part of the questions and measure on the other; what is returned was fitted to the first part only.

    Args:
        rows: from `read_asked_questions`.
        tolerance: see `fit_calibration`.
        held_out: share of the questions that is measured.
        seed: of the split.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    first = max(1, min(len(rows) - 1, round((1 - held_out) * len(rows))))
    record = fit_calibration([rows[index] for index in order[:first]], tolerance)
    saving = measure_saving(record, [rows[index] for index in order[first:]])
    return {**record, "held_out": asdict(saving)}, saving


def install(record: dict[str, Any], variant: str | Path) -> None:
    """Put a calibration into a variant: its processor then knows `num_visual_tokens="auto"`.

    Raises:
        ValueError: for a folder that is no variant, brings code that knows no "auto", or cannot give one of the m.
    """
    folder = Path(variant)
    path = folder / "processor_config.json"
    if not path.exists() or not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no variant: it needs config.json and processor_config.json.")
    if not (folder / CODE).exists():
        raise ValueError(f"{folder} brings older code without {CODE}: save the variant again with this version.")
    fields = read_json(path)
    largest = fields.get("max_num_visual_tokens") or fields.get("num_visual_tokens") or 0
    if record["counts"][-1] > largest:
        raise ValueError(
            f"{folder} takes up to {largest} visual tokens; the calibration chooses up to {record['counts'][-1]}."
        )
    write_json(path, {**fields, "auto_num_visual_tokens": record})


def saving_text(saving: Saving) -> str:
    """The measurement in a few lines."""
    fixed = "  ".join(f"m={m}: {score:.4f}" for m, score in saving.fixed.items())
    chosen = ", ".join(f"m = {m} to {count}" for m, count in saving.chosen.items())
    return "\n".join(
        [
            f"{saving.questions} held-out questions. Every question at the same m: {fixed}",
            f"auto: score {saving.score:.4f} with {saving.mean_tokens:.2f} visual tokens on average ({chosen})",
            f"      saves {saving.saved:.1%} of {saving.largest} tokens, loses {100 * saving.loss:.2f} points "
            f"(standard error {100 * saving.loss_error:.2f})",
        ]
    )


def asked_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as the file that `read_asked_questions` reads."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

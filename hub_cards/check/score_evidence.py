"""Measured facts against themselves: numbers that no evaluation can give together, and plots that show others."""

import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from fusedvlm.evaluation.results import EvaluationResults, TaskScore
from fusedvlm.hub_cards.facts import CardFacts
from fusedvlm.hub_cards.release.release_files import plot_files
from fusedvlm.hub_cards.release.run_facts import read_content

CLOSE = 1e-6  # relative; scores are written at full precision
BLOCK = 8  # pixels; letters and lines move by one or two between versions of matplotlib
# Of 255. Drawn by another version of matplotlib, no block of a sound plot differs as much; a moved curve does.
LARGEST_BLOCK_DIFFERENCE = 60.0


def score_problems(results: EvaluationResults) -> Iterator[str]:
    """What is impossible in results: two scores of one task at one m, counts below one, standard errors that a mean
    over so many questions cannot have.

    Scores in 0..1 have a variance of at most p (1 - p) (Bhatia and Davis, 2000), and exactly that where every question
    is right or wrong; so a score that was raised afterwards shows. Scores on a scale up to 100 are divided by it.

    Args:
        results: what facts.json or a results file says.
    """
    seen = set()
    for row in results.scores:
        where = f"{row.label} at m = {row.num_visual_tokens}"
        if row.key in seen:
            yield f"{where} has two scores"
        seen.add(row.key)
        if row.count < 0 or (row.standard_error or 0) < 0 or not math.isfinite(row.score) or not _is_told(row):
            yield f"{where} has the score {row.score} over {row.count} questions, standard error {row.standard_error}"
    for latency in results.latencies:
        if not 0 < latency.time_to_first_token <= latency.seconds_per_answer * (1 + CLOSE):
            yield f"the latency at m = {latency.num_visual_tokens} has a first token after the whole answer"
    yield from _spread_problems(results.scores)


def _is_told(row: TaskScore) -> bool:
    """Whether a row has what it must: questions and an error, or the reason why there is none."""
    return bool(row.error_note) or (row.count > 0 and row.standard_error is not None)


def _spread_problems(rows: list[TaskScore]) -> Iterator[str]:
    for row in rows:
        if row.scale and (row.score < 0 or row.score > (row.maximum or math.inf) * (1 + CLOSE)):
            yield f"{row.label} at m = {row.num_visual_tokens} has the score {row.score:.4g} on a scale of {row.scale}"
    guessed = [row for row in rows if not row.scale]
    largest = max((row.score for row in guessed), default=0.0)
    if largest > 100 or any(row.score < 0 for row in guessed):
        guessed = []  # a scale of its own
    yield from _spreads_of(guessed, 1.0 if largest <= 1 else 100.0)
    for scale in sorted({row.maximum for row in rows if row.scale and row.maximum}):
        yield from _spreads_of([row for row in rows if row.scale and row.maximum == scale], scale)


def _spreads_of(rows: list[TaskScore], scale: float) -> Iterator[str]:
    by_task = defaultdict(list)
    for row in rows:
        if row.count > 1 and row.is_mean:
            by_task[row.label].append(row)
    for task, measured in by_task.items():
        exact = [_all_or_nothing(row, scale) for row in measured]
        for row, is_exact in zip(measured, exact, strict=True):
            bound = _largest_error(row, scale)
            where = f"{task} at m = {row.num_visual_tokens} has the score {row.score:.4g} over {row.count} questions"
            if (row.standard_error or 0.0) > bound * (1 + CLOSE) + CLOSE * scale:
                yield f"{where} and a standard error of {row.standard_error:.4g}; it can be at most {bound:.4g}"
            elif not is_exact and sum(exact) > len(exact) / 2:
                yield f"{where}, which does not go with its standard error {row.standard_error:.4g} as at the other m"


def _largest_error(row: TaskScore, scale: float) -> float:
    share = min(max(row.score / scale, 0.0), 1.0)
    return scale * math.sqrt(share * (1 - share) / (row.count - 1))


def _all_or_nothing(row: TaskScore, scale: float) -> bool:
    """Whether a row reads as a share of questions answered right."""
    right = row.score / scale * row.count
    bound = _largest_error(row, scale)
    return abs(right - round(right)) <= CLOSE * row.count and abs((row.standard_error or 0.0) - bound) <= CLOSE * scale


def plot_problems(facts: CardFacts, files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of plots that are not what the facts draw, or that nobody draws."""
    wanted = plot_files(facts)
    for name in sorted(name for name in files if name.startswith("plots/") and name not in wanted):
        yield name, "is no plot of this card"
    for name, content in wanted.items():
        if name not in files:
            yield name, "missing, though the facts draw it"
        elif not same_picture(files[name].read_bytes(), read_content(content)):
            yield name, "does not show what facts.json says"


def same_picture(found: bytes, wanted: bytes) -> bool:
    """Whether a PNG is the one drawn here: pixel by pixel from the same version of matplotlib, else roughly."""
    if found == wanted:
        return True
    try:
        picture = Image.open(io.BytesIO(found), formats=["PNG"])
        drawn_by = picture.info.get("Software")
        left = np.asarray(picture.convert("RGB"), np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    right = np.asarray(Image.open(io.BytesIO(wanted)).convert("RGB"), np.float32)
    if left.shape != right.shape:
        return False
    if drawn_by == f"matplotlib {matplotlib.__version__}":
        return bool((left == right).all())
    return float(np.abs(_blocks(left) - _blocks(right)).max()) <= LARGEST_BLOCK_DIFFERENCE


def _blocks(pixels: np.ndarray) -> np.ndarray:
    """Means over blocks of pixels (height, width, 3) -> (height / 8, width / 8, 3)."""
    height, width = (side // BLOCK * BLOCK for side in pixels.shape[:2])
    split = pixels[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
    return split.mean(axis=(1, 3))

"""A tiny family of variants on disk, as the quickstart leaves one, in about a second."""

import json
from pathlib import Path

from fusedvlm.evaluation import Environment, EvaluationResults, Latency, TaskScore
from fusedvlm.tests import tiny

COUNTS = (1, 7, tiny.MAX_M)
ENVIRONMENT = Environment("fusedvlm quickstart --seed 3", "2026-02-03", "a test", {"torch": "2.9", "python": "3.12"})
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def results(scale: float = 1.0, counts: tuple[int, ...] = COUNTS) -> EvaluationResults:
    """Made-up results whose numbers all differ; `scale` makes a control of them."""
    rows = [
        TaskScore(task, m, scale * (0.1 + 0.05 * number + 0.0317 * m), 64 + number, 0.01 + 0.001 * m)
        for m in counts
        for number, task in enumerate(("reading", "counting"))
    ]
    return EvaluationResults(ENVIRONMENT, rows, [Latency(m, 0.011 + 0.0013 * m, 0.05 + 0.002 * m, 5) for m in counts])


def write_results(folder: Path, counts: tuple[int, ...] = COUNTS) -> None:
    """results.json, swapped.json and run.json."""
    results(1.0, counts).save(folder / "results.json")
    results(0.5, counts).save(folder / "swapped.json")
    record = {"settings": {"seed": 3, "num_visual_tokens": list(counts)}, "stages": {"generation": {"loss": 0.25}}}
    (folder / "run.json").write_text(json.dumps(record))


def save_variant(folder: Path, model, processor, m: int, text: str | None = None) -> Path:
    """One variant: self-contained, or referring to the language model with the Hub id `text`."""
    config = model.config
    names = ("num_visual_tokens", "num_followup_visual_tokens", "text_model_name_or_path", "text_model_revision")
    before = {name: getattr(config, name) for name in names}
    config.num_visual_tokens = processor.num_visual_tokens = m
    config.num_followup_visual_tokens = processor.num_followup_visual_tokens = min(3, m)
    config.text_model_name_or_path, config.text_model_revision = text, COMMIT if text else None
    try:
        model.save_pretrained(folder, merged=text is None)
    finally:
        for name, value in before.items():
            setattr(config, name, value)
    processor.save_pretrained(folder)
    return folder


def write_family(folder: Path, text: str | None = None, counts: tuple[int, ...] = COUNTS, name: str = "tiny") -> Path:
    """Variants with their results; the backbones lie elsewhere."""
    model = tiny.build_model(folder.parent / f"{folder.name}-backbones")
    processor = tiny.build_tiny_processor(model)
    for m in counts:
        save_variant(folder / f"{name}-m{m}", model, processor, m, text)
    write_results(folder, counts)
    return folder

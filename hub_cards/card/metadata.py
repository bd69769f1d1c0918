"""The metadata block of a card."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fusedvlm.evaluation.results import TaskScore
from fusedvlm.hub_cards.facts import CardFacts

PIPELINE = "image-text-to-text"


def card_metadata(facts: CardFacts) -> str:
    """YAML of the metadata block, without its fences. What nobody stated is left out."""
    stated, counted = facts.stated, facts.counted
    bases = [part.hub_id for part in (counted.language_model, counted.vision) if part.hub_id]
    results = evaluation_results(facts)
    data = ModelCardData(
        language=list(stated.languages) or None,
        license=stated.license,
        license_name=_line(stated.license_name),
        license_link=_line(stated.license_link),
        library_name="transformers",
        pipeline_tag=PIPELINE,
        base_model=bases or None,
        # What the Hub would otherwise guess: trained parts over a referenced model, or all parts in one repository.
        base_model_relation=("merge" if counted.self_contained else "adapter") if bases else None,
        datasets=sorted(dataset.id for dataset in stated.datasets if dataset.id) or None,
        tags=tags(facts),
        model_name=facts.repo_id.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def tags(facts: CardFacts) -> list[str]:
    """Search tags, sorted: equal facts must give equal bytes."""
    return sorted(
        ["custom_code", "fusedvlm", f"fusedvlm-m{facts.m}", "multimodal", "vision-language-model", "visual-tokens"]
    )


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """This variant's own scores, one entry per task, at full precision."""
    rows = [row for row in facts.measured.scores if row.num_visual_tokens == facts.m] if facts.measured else []
    return [
        EvalResult(
            task_type=PIPELINE,
            dataset_type=_dataset(facts, row.task),
            dataset_name=_line(row.label) or "",
            dataset_config=_line(row.label),  # entries of one dataset and configuration would be merged into one
            metric_type=_metric(facts, row),
            metric_name="mean score" if row.metric == "score" else _line(row.metric),
            metric_value=row.score,
            metric_args=_metric_args(facts, row),
        )
        for row in sorted(rows, key=lambda row: row.label)
    ]


def _line(text: str | None) -> str | None:
    """Text on one line: readers of the block end it at any line of dashes, quoted or not."""
    return None if text is None else " ".join(text.split())


def _metric(facts: CardFacts, row: TaskScore) -> str:
    """The metric as a registered benchmark calls it, else by its own name in letters that the Hub accepts."""
    if row.task in facts.stated.benchmarks and row.is_primary:
        return facts.stated.benchmarks[row.task].metric
    return re.sub(r"[^A-Za-z0-9_-]+", "-", row.metric).strip("-").lower() or "score"


def _metric_args(facts: CardFacts, row: TaskScore) -> dict[str, Any]:
    """What a number means nothing without; of newer results also scale and, without an error, the reason."""
    args: dict[str, Any] = {"num_visual_tokens": facts.m, "count": row.count, "standard_error": row.standard_error}
    if row.scale:
        args["scale"] = row.scale
    if row.error_note:
        args["error"] = row.error_note
    if row.harness:
        args["harness"] = _harness(facts, row)
    return args


def _harness(facts: CardFacts, row: TaskScore) -> str:
    source = facts.measured.sources.get(row.source) if facts.measured else None
    if source is None:
        return row.harness
    preset = f", preset {source.preset}" if source.preset else ""
    return f"{source.harness} {source.harness_version}{preset}"


def _dataset(facts: CardFacts, task: str) -> str:
    """The Hub id of a stated benchmark, else the task's name in letters that the Hub accepts."""
    if task in facts.stated.benchmarks:
        return facts.stated.benchmarks[task].id
    return re.sub(r"[^A-Za-z0-9_-]+", "-", task).strip("-") or "task"

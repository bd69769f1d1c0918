"""Files of a repository that are written from facts: results, training record, card, plots, checksums."""

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from fusedvlm.hub_cards.card.card_plots import latency_plot, score_plot
from fusedvlm.hub_cards.card.render_card import render_card
from fusedvlm.hub_cards.facts import CardFacts

from .bundle import Files
from .run_facts import CONTROL, RESULTS, content_hash

CHECKSUMS = "checksums.json"
FACTS = "facts.json"
CARD = "README.md"
TRAINING, DATA = "training/config.json", "training/data.json"
# Written by the Hub, not by us.
FOREIGN = (".gitattributes",)


def evidence_files(facts: CardFacts) -> Files:
    """Measured results, training settings, data manifest and registered benchmark results, as far as they exist."""
    files: Files = {DATA: _json(data_manifest(facts))}
    if facts.measured is not None:
        files[RESULTS] = _json(asdict(facts.measured))
    if facts.control is not None:
        files[CONTROL] = _json(asdict(facts.control))
    if facts.training is not None:
        files[TRAINING] = _json({key: value for key, value in facts.training.items() if key != "data"})
    return files | benchmark_files(facts)


def data_manifest(facts: CardFacts) -> dict[str, Any]:
    """Training data as stated, and as the run recorded it."""
    recorded = (facts.training or {}).get("data")
    manifest: dict[str, Any] = {"stated": [asdict(dataset) for dataset in facts.stated.datasets], "recorded": recorded}
    missing = [] if facts.stated.datasets else ["nobody stated the training data (datasets in facts.yaml)"]
    if recorded is None:
        missing.append("the training run recorded no data manifest")
    return manifest | {"missing": missing}


def benchmark_files(facts: CardFacts) -> Files:
    """`.eval_results/*.yaml` for tasks that were stated to be benchmarks registered on the Hub."""
    files: Files = {}
    if facts.measured is None:
        return files
    for score in facts.measured.scores:
        benchmark = facts.stated.benchmarks.get(score.task)
        # A registered benchmark gets its own number alone: not one of a part, nor of other data.
        if benchmark is None or score.num_visual_tokens != facts.m or score.note or not score.is_primary:
            continue
        harness = f", {score.metric} by {score.harness}" if score.harness else ""
        entry = EvalResultEntry(
            dataset_id=benchmark.id,
            task_id=benchmark.task_id,
            value=score.score,
            date=facts.measured.environment.date,
            notes=f"m = {facts.m} visual tokens, n = {score.count}{harness}",
        )
        name = f".eval_results/{benchmark.id.replace('/', '--')}--{benchmark.task_id}.yaml"
        files[name] = yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()
    return files


def card_files(facts: CardFacts) -> Files:
    """The card with its facts and plots."""
    return {FACTS: facts.to_json().encode(), CARD: render_card(facts).encode(), **plot_files(facts)}


def plot_files(facts: CardFacts) -> Files:
    """The card's plots, as far as there is something to draw."""
    return dict(_drawn(facts.to_json()))


@lru_cache(maxsize=4)
def _drawn(facts_json: str) -> dict[str, bytes]:
    """Plots of the facts, drawn once: a release is drawn, then checked."""
    facts = CardFacts.from_json(facts_json)
    plots = {"plots/score_vs_m.png": score_plot(facts), "plots/latency_vs_m.png": latency_plot(facts)}
    return {name: content for name, content in plots.items() if content is not None}


def checksums(files: Files) -> bytes:
    """checksums.json: sha256 of every file but itself."""
    hashes = {name: content_hash(content) for name, content in sorted(files.items()) if name != CHECKSUMS}
    return _json({"algorithm": "sha256", "files": hashes})


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

"""`run.json`: what a run was asked to do, with which versions and data. Cards read it; resuming compares with it."""

import json
import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fusedvlm.files import read_json, write_atomically
from fusedvlm.trainers.recipes.recipe_files import Recipe

FORMAT = 1
NAME = "run.json"
PACKAGES = ("fusedvlm", "torch", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed", "safetensors")
# Settings that do not change what is computed, so a resumed run may have others.
HARMLESS = (
    "training.logging_", "training.save_", "training.eval_", "training.report_to", "training.run_name",
    "training.dataloader_", "training.disable_tqdm", "training.output_dir", "training.per_device_eval",
    "training.push_",
    "training.hub_", "training.per_device_train_batch_size", "training.gradient_accumulation_steps", "run.resume",
    "training.gradient_checkpointing", "training.use_cpu", "run.torch_compile", "model.attn_implementation",
    "training.peak_tflops", "training.watch_steps", "training.log_",
)  # fmt: skip


def describe_run(recipe: Recipe, data_manifest: Any, processes: int) -> dict[str, Any]:
    """The record of a run that starts now.

    Returns:
        `format`, `stage`, `recipe` (the resolved sections), `versions`, `processes`, `command`, `started` (UTC),
        `data` (the manifest), `finished` (None until the end).
    """
    return {
        "format": FORMAT,
        "stage": recipe.stage,
        "recipe": recipe.sections,
        "source": Path(recipe.source).name,
        "versions": package_versions(),
        "processes": processes,
        "command": " ".join(["fusedvlm", *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": data_manifest,
        "finished": None,
    }


def package_versions() -> dict[str, str]:
    """Versions of this package, of what it trains with, and of Python; what is not installed is left out."""
    installed = {entry.metadata["Name"].lower(): entry.version for entry in metadata.distributions()}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **found}


def write_record(output_dir: Path, record: dict[str, Any]) -> None:
    """Write `run.json` atomically."""
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False, default=os.fspath)
    write_atomically(output_dir / NAME, text + "\n")


def read_record(output_dir: Path) -> dict[str, Any] | None:
    """The record of an earlier start in this folder; None when there is none.

    Raises:
        ValueError: when the file is not a record of this format.
    """
    path = output_dir / NAME
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} is not a run record of format {FORMAT}.")
    return record


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that decide what is computed and differ between two records' recipes, as `name: old -> new`."""
    before, after = _flatten(old), _flatten(new)
    names = sorted({*before, *after})
    return [
        f"{name}: {before.get(name, 'default')} -> {after.get(name, 'default')}"
        for name in names
        if before.get(name) != after.get(name) and not name.startswith(HARMLESS)
    ]


def _flatten(sections: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in sections.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        elif value not in (None, {}):
            flat[f"{prefix}{name}"] = _plain(value)
    return flat


def _plain(value: Any) -> str:
    """A value as text that does not depend on how it was written: 1e-3 is 0.001, `true` is True."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    try:
        return f"{float(value):g}" if not isinstance(value, bool) else str(value).lower()
    except (TypeError, ValueError):
        return str(value).lower() if str(value).lower() in ("true", "false") else str(value)

"""The training set a recipe describes, and what is remembered about it."""

from pathlib import Path
from typing import Any

from .run_arguments import DataArguments


def open_datasets(arguments: DataArguments):
    """Training and evaluation set; the latter is None when no source is named.

    Raises:
        ValueError: for a source that does not exist or cannot be read, naming it.
    """
    train = _open(arguments.sources, arguments.mixture_seed, arguments.fraction, arguments.fraction_seed)
    if not arguments.eval_sources:
        return train, None
    return train, _open(arguments.eval_sources, arguments.mixture_seed, 1.0, 0)


def _open(sources: list[dict[str, Any]], seed: int, fraction: float, fraction_seed: int):
    from fusedvlm.data import build_dataset

    return build_dataset({"sources": sources, "seed": seed})


def data_manifest(arguments: DataArguments, dataset) -> dict[str, Any]:
    """Sources, their files' sizes and times, the subset, and how many samples it has."""
    return {
        "sources": [{**source, **_facts(source)} for source in arguments.sources],
        "mixture_seed": arguments.mixture_seed,
        "fraction": arguments.fraction,
        "fraction_seed": arguments.fraction_seed,
        "samples": len(dataset),
    }


def _facts(source: dict[str, Any]) -> dict[str, Any]:
    path = Path(str(source.get("path", "")))
    return {"bytes": path.stat().st_size} if path.is_file() else {}

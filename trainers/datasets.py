"""The training set a recipe describes, and what is remembered about it."""

from pathlib import Path
from typing import Any

from .run_arguments import DataArguments


def open_datasets(arguments: DataArguments):
    """Training and evaluation set; the latter is None when no source is named.

    Raises:
        ValueError: for a source that does not exist or cannot be read, naming it.
    """
    from fusedvlm.data import build_dataset

    spec = {"sources": subset_sources(arguments), "seed": arguments.mixture_seed}
    train = build_dataset(spec)
    if not arguments.eval_sources:
        return train, None
    return train, build_dataset({"sources": arguments.eval_sources, "seed": arguments.mixture_seed})


def subset_sources(arguments: DataArguments) -> list[dict[str, Any]]:
    """The training sources with `data.fraction` on top of each one's own fraction."""
    if arguments.fraction == 1:
        return arguments.sources
    return [
        {
            "seed": arguments.fraction_seed,
            **source,
            "fraction": float(source.get("fraction", 1.0)) * arguments.fraction,
        }
        for source in arguments.sources
    ]


def data_manifest(arguments: DataArguments, dataset) -> dict[str, Any]:
    """Sources with their files' sizes, the subset, and how many samples an epoch has (None when streamed)."""
    return {
        "sources": [{**source, **_facts(source)} for source in subset_sources(arguments)],
        "mixture_seed": arguments.mixture_seed,
        "samples": len(dataset) if hasattr(dataset, "__len__") else None,
    }


def _facts(source: dict[str, Any]) -> dict[str, Any]:
    path = Path(str(source.get("path", "")))
    return {"bytes": path.stat().st_size} if path.is_file() else {}

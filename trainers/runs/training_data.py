"""The training set a recipe describes, and what is remembered about it."""

from pathlib import Path
from typing import Any

from fusedvlm.files import read_json
from fusedvlm.trainers.recipes.run_arguments import DataArguments


def open_datasets(arguments: DataArguments):
    """Training and evaluation set; the latter is None when no source is named.

    Raises:
        ValueError: for a source that does not exist or cannot be read, naming it.
    """
    from fusedvlm.data import build_dataset

    train = build_dataset(data_section(arguments))
    if not arguments.eval_sources:
        return train, None
    # A stream would otherwise go on for ever, as training wants it; an evaluation has to end.
    return train, build_dataset({"stop": "all_exhausted", **_read(arguments.eval_sources, arguments.mixture_seed)})


def data_section(arguments: DataArguments) -> dict[str, Any]:
    """The training data as `build_dataset` takes it, `data.fraction` on top of each source's own."""
    from fusedvlm.data.sources.build_dataset import recipe_section

    section = _read(arguments.sources, arguments.mixture_seed)
    return recipe_section({**section, "fraction": arguments.fraction, "fraction_seed": arguments.fraction_seed})


def data_manifest(arguments: DataArguments, dataset) -> dict[str, Any]:
    """Sources with their files' sizes, the mixture's options, how many samples an epoch has (None when streamed), and
    the manifest that was made beforehand."""
    section = data_section(arguments)
    written = None
    if arguments.manifest is not None:
        if not Path(arguments.manifest).is_file():
            raise ValueError(f"data.manifest={arguments.manifest}: no such file; `fusedvlm data manifest` writes it.")
        written = read_json(arguments.manifest)
    return {
        "sources": [{**source, **_facts(source)} for source in section["sources"]],
        "mixture": {name: value for name, value in section.items() if name != "sources"},
        "samples": len(dataset) if hasattr(dataset, "__len__") else None,
        "manifest": written,
    }


def _read(sources: list[dict[str, Any]] | str, seed: int) -> dict[str, Any]:
    from fusedvlm.data import read_spec

    if isinstance(sources, list):
        return {"sources": sources, "seed": seed}
    section = read_spec(sources)
    section = section if isinstance(section, dict) and "sources" in section else {"sources": section}
    return {"seed": seed, **section}


def _facts(source: dict[str, Any]) -> dict[str, Any]:
    """Size in bytes of the source's files, where its path names files."""
    path = source.get("path", "")
    files = [Path(str(name)) for name in (path if isinstance(path, list) else [path])]
    return {"bytes": sum(file.stat().st_size for file in files)} if all(file.is_file() for file in files) else {}

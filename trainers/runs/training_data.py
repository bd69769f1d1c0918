"""The training set a recipe describes, and what is remembered about it."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from fusedvlm.console import say
from fusedvlm.data import build_dataset, read_spec
from fusedvlm.data.sources.build_dataset import recipe_section
from fusedvlm.data.sources.find_files import find_files
from fusedvlm.files import read_json, sha256_of
from fusedvlm.trainers.recipes.run_arguments import DataArguments

LONG_READ = 20e9  # bytes


def open_datasets(arguments: DataArguments) -> tuple[Any, Any]:
    """Training and evaluation set; the latter is None when no source is named.

    Raises:
        ValueError: for a source that does not exist or cannot be read, naming it.
    """
    section = data_section(arguments)
    train = build_dataset(section)
    if not hasattr(train, "__len__") and section.get("stop", "never") != "never":
        # A resumed run skips what it had, and could not skip beyond the end of a stream.
        raise ValueError(f"stop: {section['stop']} ends a stream, and training needs one without end; leave stop out.")
    if not arguments.eval_sources:
        return train, None
    # A stream would otherwise go on for ever, as training wants it; an evaluation has to end.
    return train, build_dataset({"stop": "all_exhausted", **_read(arguments.eval_sources, arguments.mixture_seed)})


def data_section(arguments: DataArguments) -> dict[str, Any]:
    """The training data as `build_dataset` takes it, `data.fraction` on top of each source's own."""
    section = _read(arguments.sources, arguments.mixture_seed)
    return recipe_section({**section, "fraction": arguments.fraction, "fraction_seed": arguments.fraction_seed})


def data_manifest(arguments: DataArguments, dataset: Any) -> dict[str, Any]:
    """Sources with their files' sizes and checksums, the mixture's options, how many samples an epoch has (None when
    streamed), and the manifest that was made beforehand."""
    section = data_section(arguments)
    written = None
    sources = [{**source, **facts} for source, facts in zip(section["sources"], all_facts(section), strict=True)]
    if arguments.manifest is not None:
        if not Path(arguments.manifest).is_file():
            raise ValueError(f"data.manifest={arguments.manifest}: no such file; `fusedvlm data manifest` writes it.")
        written = read_json(arguments.manifest)
        refuse_stale_manifest(written, sources, arguments.manifest)
    return {
        "sources": sources,
        "mixture": {name: value for name, value in section.items() if name != "sources"},
        "samples": len(dataset) if hasattr(dataset, "__len__") else None,
        "manifest": written,
    }


def _read(sources: Any, seed: int) -> dict[str, Any]:
    if isinstance(sources, list):
        return {"sources": sources, "seed": seed}
    section = read_spec(sources)
    section = section if isinstance(section, dict) and "sources" in section else {"sources": section}
    return {"seed": seed, **section}


def all_facts(section: dict[str, Any]) -> list[dict[str, Any]]:
    """What is remembered of each source's files; read by the first process, for all of them."""
    found = [[_facts(source) for source in section["sources"]] if PartialState().is_main_process else None]
    return broadcast_object_list(found)[0]


def _facts(source: dict[str, Any]) -> dict[str, Any]:
    """Size and SHA-256 of each of a source's files; nothing of a dataset on the Hub."""
    names = source.get("path", "")
    names = [str(name) for name in (names if isinstance(names, list) else [names])]
    if len(names) == 1 and os.path.isdir(names[0]):
        names = [str(path) for path in sorted(Path(names[0]).rglob("*")) if path.is_file()]
    try:
        files = [file for file in find_files(names) if "://" not in file]
    except ValueError:
        return {}
    stats = [(file, os.stat(file)) for file in files]
    total = sum(stat.st_size for _, stat in stats)
    if total > LONG_READ:
        say(f"Reading {total / 1e9:.0f} GB of training data once for their checksums.")
    entries = [
        {"path": os.path.basename(file), "bytes": stat.st_size, "sha256": _digest(file, stat.st_size, stat.st_mtime_ns)}
        for file, stat in stats
    ]
    return {"bytes": total, "files": entries}


@lru_cache(maxsize=100_000)
def _digest(file: str, size: int, changed: int) -> str:
    """SHA-256 of a file, read once by a process while its size and time stay; the variants of stage 3 share it."""
    return sha256_of(file)


def refuse_stale_manifest(manifest: dict[str, Any], sources: list[dict[str, Any]], name: str) -> None:
    """Refuse a manifest that was made of other contents of the files that are there now.

    Raises:
        ValueError: naming the file.
    """
    stated: dict[str, set[str]] = {}
    for source in manifest.get("sources") or []:
        for entry in source.get("files") or []:
            if entry.get("sha256"):
                stated.setdefault(entry["path"], set()).add(entry["sha256"])
    for source in sources:
        for entry in source.get("files", ()):
            if entry["path"] in stated and entry["sha256"] not in stated[entry["path"]]:
                raise ValueError(
                    f"data.manifest={name} was made of another {entry['path']} (its SHA-256 differs): run "
                    "`fusedvlm data manifest` again, or bring the file back."
                )


def data_changes(before: dict[str, Any] | None, now: dict[str, Any] | None) -> list[str]:
    """How the data of two records differ; what an older record does not hold is not compared."""
    before, now = before or {}, now or {}
    found = [
        f"data {part}: {before.get(part)} -> {now.get(part)}"
        for part in ("mixture", "samples")
        if before.get(part) != now.get(part)
    ]
    sources = before.get("sources") or [], now.get("sources") or []
    if len(sources[0]) != len(sources[1]):
        return [*found, f"data sources: {len(sources[0])} -> {len(sources[1])}"]
    for number, (old, new) in enumerate(zip(*sources, strict=True)):
        name = new.get("name") or Path(str(new.get("path") or number)).name
        digests = [{entry["path"]: entry["sha256"] for entry in one.get("files", ())} for one in (old, new)]
        if "files" in old and "files" in new and digests[0] != digests[1]:
            other = sorted(path for path in {*digests[0], *digests[1]} if digests[0].get(path) != digests[1].get(path))
            found.append(f"data source {name}: {other[0]} has other contents (SHA-256), if only in another order")
        same = [key for key in {*old} & {*new} - {"files", "bytes"} if old[key] != new[key]]
        found += [f"data source {name}, {key}: {old[key]} -> {new[key]}" for key in sorted(same)]
        if "files" not in old and old.get("bytes", new.get("bytes")) != new.get("bytes"):
            found.append(f"data source {name}: {old['bytes']} -> {new.get('bytes')} bytes")
    return found

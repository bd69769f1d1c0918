"""Write a training set as shards of the one format, and a manifest of what it is made of."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from fusedvlm.console import progress
from fusedvlm.data.mixing.mixture import Mixture
from fusedvlm.data.mixing.streaming import StreamingMixture
from fusedvlm.data.sample_files import as_json, image_bytes
from fusedvlm.data.sources.build_dataset import distinct_names, parse_data_spec
from fusedvlm.data.sources.converters import Sample
from fusedvlm.data.sources.find_files import find_files
from fusedvlm.data.sources.readers import TEXT
from fusedvlm.data.sources.source_spec import RowStream, SourceSpec, load_source
from fusedvlm.files import sha256_of

from .shard import Shard

SHARD_FEATURES = datasets.Features(
    {
        "id": TEXT,
        "source": TEXT,
        "images": datasets.List(datasets.Image()),
        "messages": datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
    }
)


def write_shards(
    spec: Any,
    output: str | Path,
    file_format: str = "parquet",
    rows_per_shard: int = 1000,
    embed_images: bool = True,
    num_proc: int = 1,
) -> dict[str, Any]:
    """Write one epoch of a data section, in the order of its mixture.

    Args:
        spec: see `parse_data_spec`.
        output: folder to make; it appears when everything is written.
        file_format: "parquet" (source type `parquet`) or "webdataset" (tar shards).
        rows_per_shard: samples per file.
        embed_images: put the images' files, as they are, into the shards; else their absolute paths.
        num_proc: processes that write; the shards are the same however many there are.

    Returns:
        `{"folder", "samples", "images", "shards", "bytes"}`.

    Raises:
        ValueError: for a folder that exists, an unknown format, and images that cannot be read.
    """
    output = Path(output)
    if file_format not in ("parquet", "webdataset"):
        raise ValueError(f"format {file_format!r} must be parquet or webdataset.")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={rows_per_shard} must be at least 1.")
    if file_format == "webdataset" and not embed_images:
        raise ValueError("Tar shards hold their images; write parquet to keep paths.")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise ValueError(f"{output} exists and is not empty; choose another folder or remove it.")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    counts = {"samples": 0, "images": 0, "shards": 0}
    try:
        samples, total = one_epoch(spec)
        if num_proc > 1:
            blocks = write_in_parallel(spec, total, part, file_format, rows_per_shard, embed_images, num_proc)
        else:
            rows = iter(progress(samples, "Writing", total))
            blocks = write_in_turn(rows, part, file_format, rows_per_shard, embed_images)
        for written, images in blocks:
            counts["shards"] += 1
            counts["samples"] += written
            counts["images"] += images
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    return {"folder": str(output), **counts, "bytes": size}


def write_in_turn(
    rows: Iterator[Sample], folder: Path, file_format: str, rows_per_shard: int, embed_images: bool
) -> Iterator[tuple[int, int]]:
    """Write shard after shard; gives the rows and images of each."""
    number = 0
    while block := list(islice(rows, rows_per_shard)):
        yield write_block(block, folder, number, file_format, embed_images)
        number += 1


def write_in_parallel(
    spec: Any, total: int | None, folder: Path, file_format: str, rows_per_shard: int, embed_images: bool, num_proc: int
) -> Iterator[tuple[int, int]]:
    """The same by several processes, each opening the sources for itself (their conversion is in the cache by now).

    Raises:
        ValueError: for sources without a length, whose rows cannot be asked for by number.
    """
    if total is None:
        raise ValueError("--num-proc shares rows out by their numbers, and streamed sources have none; leave it out.")
    starts = range(0, total, rows_per_shard)
    common = (spec, str(folder), file_format, rows_per_shard, embed_images)
    with ProcessPoolExecutor(num_proc, mp_context=get_context("spawn")) as pool:
        jobs = pool.map(write_range, repeat(common), range(len(starts)))
        yield from progress(jobs, "Writing shards", len(starts))


def write_range(common: tuple[Any, str, str, int, bool], number: int) -> tuple[int, int]:
    """One shard, in a process of its own."""
    spec, folder, file_format, rows_per_shard, embed_images = common
    if not _OPENED:
        _OPENED.append(open_mixture(spec))
    start = number * rows_per_shard
    block = [_OPENED[0][index] for index in range(start, min(start + rows_per_shard, len(_OPENED[0])))]
    return write_block(block, Path(folder), number, file_format, embed_images)


_OPENED: list[Mixture] = []  # by a process that writes shards


def write_block(
    block: list[Sample], folder: Path, number: int, file_format: str, embed_images: bool
) -> tuple[int, int]:
    """One shard; gives its rows and images."""
    (write_parquet if file_format == "parquet" else write_tar)(block, folder / f"data-{number:05d}", embed_images)
    return len(block), sum(len(sample["images"]) for sample in block)


def open_mixture(spec: Any) -> Mixture:
    """The mixture of a data section whose sources all have a length."""
    specs, options = parse_data_spec(spec)
    weights: Any = [source.weight for source in specs] if specs[0].weight is not None else None
    names = distinct_names([source.label for source in specs])
    return Mixture([load_source(source) for source in specs], weights, names=names, **options)


def one_epoch(spec: Any) -> tuple[Iterator[Sample], int | None]:
    """Samples of one epoch in training order, and how many when that is known.

    Streams without weights come one after the other, so that this too is every row once.
    """
    specs, options = parse_data_spec(spec)
    sources = [load_source(source) for source in specs]
    weights: Any = [source.weight for source in specs] if specs[0].weight is not None else None
    names = distinct_names([source.label for source in specs])
    if not any(isinstance(source, RowStream) for source in sources):
        mixture = Mixture(sources, weights, names=names, **options)
        return (mixture[index] for index in range(len(mixture))), len(mixture)
    if weights is None:
        return chain.from_iterable(sources), None
    return iter(StreamingMixture(sources, weights, names=names, **options)), None


class EverySample:
    """All samples of a data section's sources, one source after the other; weights do not matter.

    It can be read any number of times, a sample at a time. Sized sources have a length, and so has their sum.

    Args:
        spec: see `parse_data_spec`.
        shard: this part of them only.
    """

    def __init__(self, spec: Any, shard: Shard = Shard()) -> None:  # noqa: B008 - frozen
        self.sources = [load_source(source) for source in parse_data_spec(spec)[0]]
        self.shard = shard

    def __iter__(self) -> Iterator[Sample]:
        return self.shard.of(chain.from_iterable(self.sources))

    def __length_hint__(self) -> int:
        sized = [source for source in self.sources if not isinstance(source, RowStream)]
        is_known = len(sized) == len(self.sources)
        return self.shard.size(sum(map(len, sized))) or 0 if is_known else 0


def write_parquet(samples: list[Sample], name: Path, embed_images: bool) -> None:
    """One parquet shard that `datasets` opens with its images."""

    def stored(image: Any) -> dict[str, Any]:
        if not embed_images:
            return {"bytes": None, "path": as_json({"images": [image]})["images"][0]}
        return {"bytes": image_bytes(image), "path": None}

    rows = [
        {
            "id": sample["id"],
            "source": sample["source"],
            "images": [stored(image) for image in sample["images"]],
            "messages": [
                {
                    "role": message["role"],
                    "content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]],
                }
                for message in sample["messages"]
            ],
        }
        for sample in samples
    ]
    table = datasets.Dataset.from_list(rows, features=SHARD_FEATURES)
    with one_bar():
        table.to_parquet(f"{name}.parquet")


@contextmanager
def one_bar() -> Iterator[None]:
    """No bars of `datasets` per shard: there is one for all of them."""
    were_on = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def write_tar(samples: list[Sample], name: Path, embed_images: bool = True) -> None:
    """One WebDataset shard: `00000.json` with the messages, `00000.0.jpg`, `00000.1.jpg`, ... with the images."""
    with tarfile.open(f"{name}.tar", "w") as archive:
        for number, sample in enumerate(samples):
            row = {key: value for key, value in sample.items() if key != "images"}
            members = {f"{number:05d}.json": json.dumps(row, ensure_ascii=False).encode()}
            for place, image in enumerate(sample["images"]):
                content = image_bytes(image)
                members[f"{number:05d}.{place}.{image_ending(content, sample)}"] = content
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def image_ending(content: bytes, sample: Sample) -> str:
    """File ending of an image's format.

    Raises:
        ValueError: naming the sample when the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            ending = str(image.format).lower()
            return {"jpeg": "jpg", "tiff": "tif"}.get(ending, ending)
    except OSError:
        raise ValueError(
            f"Sample {sample['id']} of {sample['source']}: an image cannot be opened; run data check."
        ) from None


def make_manifest(spec: Any, licenses: dict[str, str] | None = None) -> dict[str, Any]:
    """What a training set is made of, for a model card.

    Args:
        spec: see `parse_data_spec`.
        licenses: source name to license text; the source's own `license:` counts where this has none.

    Returns:
        Per source its files with size and SHA-256, samples, images, answers, options and license, and their sums.

    Raises:
        ValueError: for licenses of sources that do not exist.
    """
    specs, options = parse_data_spec(spec)
    licenses = dict(licenses or {})
    unknown = sorted(set(licenses) - {source.label for source in specs})
    if unknown:
        raise ValueError(f"No source {', '.join(unknown)}; there are {', '.join(source.label for source in specs)}.")
    entries = [describe_source(source, licenses.get(source.label)) for source in specs]
    totals = {key: sum(entry[key] for entry in entries) for key in ("samples", "images", "answers")}
    return {"format": 1, "sources": entries, "mixture": options, **totals}


def describe_source(spec: SourceSpec, license: str | None) -> dict[str, Any]:
    """Manifest entry of one source."""
    source = load_source(spec)
    counts = {"samples": 0, "images": 0, "answers": 0}
    for sample in progress(source, f"Counting {spec.label}", None if isinstance(source, RowStream) else len(source)):
        counts["samples"] += 1
        counts["images"] += len(sample["images"])
        counts["answers"] += sum(message["role"] == "assistant" for message in sample["messages"])
    is_hub = spec.type == "chat" and not spec.is_json_or_tar
    files = (
        {"repository": spec.path, "revision": spec.revision} if is_hub else {"files": hash_files(find_files(spec.path))}
    )
    kept = ("type", "fraction", "seed", "weight", "boxes", "turns_per_sample", "bad_rows")
    return {
        "name": spec.label,
        **{name: getattr(spec, name) for name in kept if getattr(spec, name) is not None},
        **files,
        **counts,
        "dropped_rows": source.dropped,
        "license": license or spec.license or "not stated; check it",
    }


def hash_files(paths: Iterable[str]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of files; of URLs the name alone."""
    entries: list[dict[str, Any]] = []
    for path in paths:
        if "://" in path:
            entries.append({"path": path})
            continue
        entries.append({"path": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": sha256_of(path)})
    return entries

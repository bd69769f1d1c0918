"""Open the files of a source as a table of converted rows, sized or streamed, without looking at any image.

JSON and tar sources are converted while they are read, once: `datasets` keeps the result in its cache as memory-mapped
Arrow, so neither the file nor its rows are in memory twice, and worker processes share them. The conversion does not
depend on other files than the source itself; image paths and boxes are resolved when a row is asked for.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import datasets
import fsspec
from datasets.exceptions import DatasetGenerationError

from fusedvlm.data.boxes import find_boxes
from fusedvlm.wording import end_of, fit

from .converters import CONVERTERS, Sample
from .find_files import find_files
from .json_rows import read_json_rows

FORMAT = 1  # raised when conversion changes, so that old caches are not used
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "images": datasets.List({"path": TEXT, "bytes": datasets.Value("binary")}),
        "messages": datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
        "problem": TEXT,  # why the row is no sample, else null
    }
)


def open_converted(
    kind: str, files: list[str], options: dict[str, Any], streaming: bool, num_proc: int | None = None
) -> Any:
    """Rows of JSON or tar files as `FEATURES`.

    Args:
        kind: a name of `CONVERTERS`.
        files: of `find_files`.
        options: of the converter, and `check_boxes`.
        streaming: give an `IterableDataset` in place of a `Dataset`.
        num_proc: processes that share the files of a `Dataset` among them; the rows stay in their order.
    """
    if streaming:
        kwargs = {"files": files, "kind": kind, "options": options}
        return datasets.IterableDataset.from_generator(convert_files, features=FEATURES, gen_kwargs=kwargs)
    # The cache's key is made of these arguments: the files' sizes and times keep it from going stale.
    stamps = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    kwargs = {"files": files, "kind": kind, "options": {**options, "stamps": stamps, "format": FORMAT}}
    try:
        shared = min(num_proc or 1, len(files))
        return datasets.Dataset.from_generator(
            convert_files, features=FEATURES, gen_kwargs=kwargs, num_proc=shared if shared > 1 else None
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def convert_files(files: list[str], kind: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of `FEATURES`; a row that is no sample says why in `problem`."""
    read = read_tar_rows if kind == "webdataset" else read_json_rows
    for file in files:
        for number, row in read(file):
            yield from convert_row(row, kind, options, f"{file}, row {number}")


def convert_row(row: Any, kind: str, options: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Rows of `FEATURES` of one row of a file."""
    if isinstance(row, ValueError):  # a line that is not JSON
        return [problem_row(f"{end_of(where)}: {row}")]
    wanted = {key: options[key] for key in ("turns_per_sample",) if options.get(key) is not None}
    try:
        samples = list(CONVERTERS[kind](row, **wanted))
    except ValueError as error:
        return [problem_row(f"{end_of(where)}: {error}")]
    return [store_sample(sample, options, where) for sample in samples]


def store_sample(sample: Sample, options: dict[str, Any], where: str) -> dict[str, Any]:
    """Row of `FEATURES` of a sample; one with a wrong box is a problem of its own, not of its neighbors."""
    try:
        if options.get("check_boxes"):
            find_boxes("\n".join(texts_of(sample)))
    except ValueError as error:
        return problem_row(f"{end_of(where)}, sample {sample['id']}: {error}")
    return {**sample, "id": sample["id"] or where, "images": store_images(sample), "problem": None}


def problem_row(problem: str) -> dict[str, Any]:
    """Row of `FEATURES` that is no sample."""
    return {"id": "", "images": [], "messages": [], "problem": fit(problem)}


def texts_of(sample: Sample) -> Iterator[str]:
    """Every text of a sample."""
    for message in sample["messages"]:
        yield from (part["text"] for part in message["content"] if part["type"] == "text")


def store_images(sample: Sample) -> list[dict[str, Any]]:
    """Images as Arrow can hold them."""
    return [
        {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": os.fspath(image), "bytes": None}
        for image in map(file_or_bytes, sample["images"])
    ]


def file_or_bytes(image: Any) -> Any:
    """A picture in memory as the bytes of a PNG; paths and bytes as they are."""
    if not hasattr(image, "convert"):
        return image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_tar_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a WebDataset shard: files with the same name up to the first dot; a `.json` and any images.

    `datasets` has a reader for these, but it wants the same files in every row: text-only rows and rows with several
    images would stop it.

    Raises:
        ValueError: naming the shard and the row without a `.json`, or with one that is not JSON.
    """
    number, key, members = 0, None, {}
    with fsspec.open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    folder, name = os.path.split(member.name)
                    if not member.isfile() or name.startswith("."):
                        continue
                    stem, _, ending = name.partition(".")
                    if key is not None and os.path.join(folder, stem) != key:
                        number += 1
                        yield number, tar_row(key, members, path)
                        members = {}
                    key = os.path.join(folder, stem)
                    if (file := archive.extractfile(member)) is not None:
                        members[ending.lower()] = file.read()
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a tar file, or damaged after row {number}: {error}.") from None
    if key is None:
        raise ValueError(f"{path}: no rows; the archive is empty.")
    yield number + 1, tar_row(key, members, path)


def tar_row(key: str, members: dict[str, bytes], path: str) -> dict[str, Any]:
    """One row of a shard: what its `.json` says, with the bytes of its images."""
    if "json" not in members:
        raise ValueError(f"{path}: {key} has no .json with the conversation, only {', '.join(sorted(members))}.")
    try:
        row = json.loads(members["json"])
    except ValueError:
        raise ValueError(f"{path}: {key}.json is not JSON.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}: {key}.json must hold an object, not a {type(row).__name__}.")
    images = [members[ending] for ending in sorted(members, key=natural) if f".{ending}".endswith(IMAGE_ENDINGS)]
    row = {name: value for name, value in row.items() if name != "image"}
    return {**row, "images": images, "id": row.get("id", key)}


def natural(ending: str) -> tuple[int, str]:
    """Sort key of a member: `2.jpg` in front of `10.jpg`."""
    number = ending.partition(".")[0]
    return (int(number) if number.isdigit() else -1), ending


def open_table(
    kind: str, path: str | list[str], subset: str | None, split: str, revision: str | None, streaming: bool
) -> Any:
    """Rows as they are of parquet files, a folder of `save_to_disk` or a dataset on the Hub; images not decoded.

    Raises:
        ValueError: when the path is no such thing.
    """
    if kind == "parquet":
        table = datasets.load_dataset("parquet", data_files=find_files(path), split="train", streaming=streaming)
    elif isinstance(path, str) and os.path.isdir(path) and os.path.exists(os.path.join(path, "state.json")):
        table = datasets.load_from_disk(path)
        table = table.to_iterable_dataset() if streaming else table
    elif isinstance(path, str):
        try:
            table = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=streaming)
        except FileNotFoundError as error:  # DatasetNotFoundError is one
            raise ValueError(f"{path}: neither JSON files, nor a saved dataset, nor one on the Hub: {error}") from None
        except DatasetGenerationError as error:
            said = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()[1:] if line.strip()]
            raise ValueError(
                fit(f"{path}: its files are no one table of conversations; name the file itself. {' '.join(said)}")
            ) from None
    else:
        raise ValueError(f"A chat source takes JSON files, a folder or a Hub id, not {path!r}; use type parquet.")
    for name, feature in (table.features or {}).items():
        if undecoded(feature) != feature:
            table = table.cast_column(name, undecoded(feature))
    return table


def undecoded(feature: Any) -> Any:
    """A feature whose images stay bytes or paths."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(undecoded(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: undecoded(part) for name, part in feature.items()}
    return feature

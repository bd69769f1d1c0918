"""`load_source`: one source of training samples from a plain dictionary, as a recipe's YAML holds it."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image

from fusedvlm.console import say
from fusedvlm.data.boxes import Placement, boxes_to_tags, square_placement
from fusedvlm.plain_data import build
from fusedvlm.wording import fit, shown

from .converters import CONVERTERS, Sample
from .find_files import JSON_ENDINGS, find_files
from .readers import convert_row, open_converted, open_table

# Where Visual Genome's images lie in SVIT's and in LLaVA-1.5's layout.
SVIT_FOLDERS = ("", "VG_100K", "VG_100K_2", "vg/VG_100K", "vg/VG_100K_2")
SHOWN_PROBLEMS = 5

OpenRow = Callable[[dict[str, Any], int], Sample]


@dataclass(frozen=True)
class SourceSpec:
    """One entry of `sources:` in a recipe.

    Raises:
        ValueError: for unknown kinds and impossible values.
    """

    type: str = field(metadata={"help": f"layout of the rows: {', '.join(CONVERTERS)}"})
    path: str | list[str] = field(metadata={"help": "file, list of files, pattern, saved dataset, or Hub id (chat)"})
    name: str = field(default="", metadata={"help": "for messages and reports; by default type and file name"})
    image_folder: str | None = field(
        default=None, metadata={"help": "what image paths are relative to; by default the folder of the first file"}
    )
    streaming: bool = field(default=False, metadata={"help": "read while training, without a cache on disk"})
    split: str = field(default="train", metadata={"help": "of a dataset on the Hub"})
    subset: str | None = field(default=None, metadata={"help": "configuration of a dataset on the Hub"})
    revision: str | None = field(default=None, metadata={"help": "commit of a dataset on the Hub"})
    fraction: float = field(default=1.0, metadata={"help": "random part of the rows to use, such as 0.1"})
    seed: int = field(default=0, metadata={"help": "seed of that random part"})
    weight: float | None = field(default=None, metadata={"help": "share in a mixture; by default the number of rows"})
    boxes: Literal["keep", "tags", "square"] = field(
        default="keep",
        metadata={"help": "keep; write [x1, y1, x2, y2] as <bbox>; or do so and move boxes onto the padded square"},
    )
    turns_per_sample: int | None = field(default=None, metadata={"help": "svit: join and cut conversations"})
    num_proc: int | None = field(
        default=None, metadata={"help": "processes that convert a sized source: several files, or rows of a table"}
    )
    bad_rows: Literal["error", "drop"] = field(default="error", metadata={"help": "what to do with malformed rows"})
    license: str | None = field(default=None, metadata={"help": "for the manifest; your reading of the license"})

    def __post_init__(self) -> None:
        if self.type not in CONVERTERS:
            raise ValueError(f"Source {self.label}: type={shown(self.type)} must be one of {', '.join(CONVERTERS)}.")
        if not self.path or not all(self.path):
            raise ValueError(f"Source {self.label}: path names no file.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Source {self.label}: fraction={self.fraction} must be above 0 and at most 1.")
        if self.turns_per_sample is not None and (self.type != "svit" or self.turns_per_sample < 1):
            raise ValueError(f"Source {self.label}: turns_per_sample is for type svit and at least 1.")
        for name, least in (("seed", 0), ("num_proc", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"Source {self.label}: {name}={value} must be a whole number from {least}.")

    @property
    def label(self) -> str:
        """Name for messages."""
        first = self.path if isinstance(self.path, str) else (self.path or ["nothing"])[0]
        return self.name or f"{self.type}:{os.path.basename(os.path.normpath(str(first)))}"

    @property
    def is_json_or_tar(self) -> bool:
        """Whether our own readers convert the rows; else `datasets` reads them and they are converted on demand."""
        if self.type in ("chat", "parquet"):
            return self.type == "chat" and all(
                JSON_ENDINGS.search(path) for path in ([self.path] if isinstance(self.path, str) else self.path)
            )
        return True

    @classmethod
    def parse(cls, spec: "dict[str, Any] | SourceSpec") -> "SourceSpec":
        """A spec from a plain dictionary.

        Raises:
            ValueError: for keys that do not exist or are missing.
        """
        if isinstance(spec, cls):
            return spec
        if not isinstance(spec, dict):
            raise ValueError(f"A source is a mapping with type and path, got {shown(spec)}.")
        if "licence" in spec and "license" not in spec:  # how it was spelled before 0.2
            spec = {"license" if name == "licence" else name: value for name, value in spec.items()}
        return build(cls, {name: value for name, value in spec.items() if value is not None}, _place(spec))


def _place(spec: dict[str, Any]) -> str:
    """How messages name a source."""
    return f"Source {fit(str(spec.get('name') or spec.get('path') or '?'), 60)}"


class RowSource:
    """Sized source: `len()`, `[row]` gives a sample whose images are paths or bytes, not yet opened.

    Args:
        spec: what it is.
        table: `datasets.Dataset` with the rows.
        open_row: table row and its number to sample.
        rows: numbers of the table's rows to use.
        dropped: how many malformed rows were left out.
    """

    def __init__(self, spec: SourceSpec, table: Any, open_row: OpenRow, rows: np.ndarray, dropped: int) -> None:
        self.spec = spec
        self.table = table
        self.open_row = open_row
        self.rows = rows
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {self.spec.label} with {len(self)} rows.")
        row = int(self.rows[index])
        return self.open_row(self.table[row], row)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class RowStream:
    """Streamed source: iterable any number of times, always in the same order, with a state to go on from.

    It gives all its rows in every worker and rank; `StreamingMixture` shares them out. Malformed rows stop it or are
    dropped; then the first ones are named and their number is said after each pass.
    """

    def __init__(self, spec: SourceSpec, table: Any, open_row: OpenRow) -> None:
        self.spec = spec
        self.table = table
        self.open_row = open_row
        self.dropped = 0
        self.number = 0  # table rows read in this pass
        self._start = 0  # table rows before the next iteration

    def __iter__(self) -> Iterator[Sample]:
        self.dropped = 0
        self.number, self._start = self._start, 0
        # Not iter(table): in a worker process that would give only a part of the shards.
        for batch in self.table.iter(batch_size=1):
            self.table.load_state_dict(None)  # a state is for one iteration; the one after it begins anew
            self.number += 1
            try:
                sample = self.open_row({name: values[0] for name, values in batch.items()}, self.number - 1)
            except ValueError as error:
                if self.spec.bad_rows == "error":
                    raise
                self.dropped += 1
                if self.dropped <= SHOWN_PROBLEMS:
                    say(f"Source {self.spec.label}: dropped {error}")
                continue
            if self.spec.fraction == 1 or hash_share(sample, self.spec.seed) < self.spec.fraction:
                yield sample
        if self.dropped:
            say(f"Source {self.spec.label}: dropped {self.dropped} malformed rows in this pass.")

    def state_dict(self) -> dict[str, Any]:
        """Where the last iteration is."""
        return {"number": self.number, "table": self.table.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next iteration begin there; None is the first row."""
        self._start = 0 if state is None else state["number"]
        self.table.load_state_dict(None if state is None else state["table"])


def load_source(spec: dict[str, Any] | SourceSpec) -> RowSource | RowStream:
    """Open a source.

    Args:
        spec: keys of `SourceSpec`, at least `type` and `path`.

    Returns:
        A sized source, or a streamed one with `streaming: true`.

    Raises:
        ValueError: for a wrong spec, missing files, and malformed rows (by file, row and field) unless `bad_rows` is
            "drop": then they are counted and reported. Streams meet theirs on the way.
    """
    spec = SourceSpec.parse(spec)
    files = [] if spec.type == "chat" and not spec.is_json_or_tar else find_files(spec.path)
    if files and spec.image_folder is None and "://" not in files[0]:
        spec = replace(spec, image_folder=os.path.dirname(files[0]) or ".")
    if spec.is_json_or_tar:
        options = {"turns_per_sample": spec.turns_per_sample, "check_boxes": spec.boxes != "keep"}
        table = open_converted(spec.type, files, options, spec.streaming, spec.num_proc)
        open_row = partial(open_stored_row, spec)
    else:
        table = open_table(spec.type, spec.path, spec.subset, spec.split, spec.revision, spec.streaming)
        open_row = partial(open_table_row, spec)
    if spec.streaming:
        return RowStream(spec, table, open_row)
    rows, dropped = good_rows(spec, table)
    return RowSource(spec, table, open_row, choose_rows(rows, spec.fraction, spec.seed), dropped)


def good_rows(spec: SourceSpec, table: Any) -> tuple[np.ndarray, int]:
    """Numbers of the rows that are samples, and how many are not.

    Raises:
        ValueError: naming the first bad rows, unless the spec says to drop them.
    """
    if "problem" not in table.column_names:
        table = table.map(
            partial(row_problem, spec),
            with_indices=True,
            remove_columns=table.column_names,
            desc=f"Checking {spec.label}",
            num_proc=spec.num_proc,
        )
    problems = table.data.column("problem").combine_chunks()
    is_good = np.asarray(problems.is_null())
    bad = np.flatnonzero(~is_good)
    if len(bad):
        first, *others = [problems[int(row)].as_py().rstrip(".") for row in bad[:SHOWN_PROBLEMS]]
        file = first.partition(", row ")[0]  # named once: the others are mostly of the same file
        shown = "; ".join([first, *(other.removeprefix(f"{file}, ") for other in others)])
        text = f"Source {spec.label}: {len(bad)} of {len(is_good)} rows are no conversations: {shown}"
        if spec.bad_rows == "error":
            raise ValueError(f"{fit(text, 255)}. Correct them, or set bad_rows: drop.")
        say(f"{text}. Dropped, because bad_rows is 'drop'.")
    return np.flatnonzero(is_good), len(bad)


def row_problem(spec: SourceSpec, row: dict[str, Any], number: int) -> dict[str, str | None]:
    """What keeps a table's row from being a sample."""
    try:
        open_table_row(spec, dict(row), number)
    except ValueError as error:
        return {"problem": str(error)}
    return {"problem": None}


def choose_rows(rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A seeded random part of the rows, in their order: `fraction` of them to the nearest, at least one."""
    if fraction == 1 or len(rows) == 0:
        return rows
    count = max(1, round(fraction * len(rows)))
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:count]
    return rows[np.sort(chosen)]


def hash_share(sample: Sample, seed: int) -> float:
    """A number in 0..1 that depends on the seed and the sample's text alone: a stream does not know its length, and its
    rows may be numbered differently from run to run."""
    text = json.dumps([seed, sample["id"], sample["messages"]], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def open_stored_row(spec: SourceSpec, row: dict[str, Any], number: int) -> Sample:
    """Sample of a row of `readers.FEATURES`.

    Raises:
        ValueError: when the row is no sample.
    """
    if row["problem"] is not None:
        raise ValueError(row["problem"])
    messages = [
        {"role": message["role"], "content": [without_nulls(part) for part in message["content"]]}
        for message in row["messages"]
    ]
    images = [image["path"] if image["bytes"] is None else image["bytes"] for image in row["images"]]
    return finish_sample(spec, {"id": row["id"], "images": images, "messages": messages})


def without_nulls(part: dict[str, str | None]) -> dict[str, str]:
    """A part as it was before Arrow gave all parts the same fields."""
    return {name: value for name, value in part.items() if value is not None}


def open_table_row(spec: SourceSpec, row: dict[str, Any], number: int) -> Sample:
    """Sample of a row as `datasets` read it.

    Raises:
        ValueError: naming source, row and field, when the row is no sample.
    """
    where = f"{spec.label}, row {number + 1}"
    [stored] = convert_row(row, "chat", {"check_boxes": spec.boxes != "keep"}, where)
    return open_stored_row(spec, stored, number)


def finish_sample(spec: SourceSpec, sample: Sample) -> Sample:
    """Name the source, find the image files, move the boxes."""
    sample["source"] = spec.label
    sample["images"] = [resolve_image(spec, image) for image in sample["images"]]
    if spec.boxes != "keep":
        placement = image_placement(sample) if spec.boxes == "square" else None
        for message in sample["messages"]:
            message["content"] = [move_boxes(part, placement) for part in message["content"]]
    return sample


def move_boxes(part: dict[str, str], placement: Placement | None) -> dict[str, str]:
    """A part with its boxes as tags, and on the padded square when there is one."""
    if part["type"] != "text" or ("[" not in part["text"] and "<bbox>" not in part["text"]):
        return part
    return {"type": "text", "text": boxes_to_tags(part["text"], placement)}


def image_placement(sample: Sample) -> Placement | None:
    """Where the one image of a sample lies on its padded square; None in a sample without images.

    Raises:
        ValueError: for a sample with several images: its boxes do not say which one they are of.
    """
    if not sample["images"]:
        return None
    if len(sample["images"]) > 1:
        raise ValueError(
            f"Sample {sample['id']}: boxes: square needs one image per sample, not {len(sample['images'])}."
        )
    return square_placement(*image_size(sample["images"][0]))


def image_size(image: str | bytes) -> tuple[int, int]:
    """Width and height of an upright image, read from its header.

    Raises:
        ValueError: naming the image that cannot be read.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            width, height = opened.size
            is_turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except OSError as error:
        raise ValueError(
            f"{image if isinstance(image, str) else 'image bytes'}: size cannot be read: {error}."
        ) from None
    return (height, width) if is_turned else (width, height)


def resolve_image(spec: SourceSpec, image: Any) -> Any:
    """An image as `load_image` finds it: relative paths are put under the source's image folder."""
    if not isinstance(image, str) or "://" in image or image.startswith("data:") or os.path.isabs(image):
        return image
    if spec.image_folder is None:
        return image
    folder = os.path.expanduser(spec.image_folder)
    if spec.type == "svit":
        folder = next((path for path in _svit_folders(folder) if image in _listing(path)), folder)
    return os.path.normpath(os.path.join(folder, image))


def _svit_folders(folder: str) -> list[str]:
    return [os.path.normpath(os.path.join(folder, inner)) for inner in SVIT_FOLDERS]


@lru_cache(maxsize=64)
def _listing(folder: str) -> frozenset[str]:
    """Names in a folder: one look instead of one per row. Absent folders hold nothing."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()

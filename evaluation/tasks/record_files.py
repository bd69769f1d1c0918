"""Questions from files: TSV with VLMEvalKit's columns, JSON Lines, datasets of the Hub or of `datasets` on the disk.

    index, image (base64, a list of them, or the index of the row that has it) or image_path, question, answer,
    A, B, C, ... (options of a choice), hint, category, l2-category, split and whatever else a task reads

What is damaged is an error that names the row, before any question is asked.
"""

import ast
import base64
import binascii
import contextlib
import csv
import hashlib
import io
import string
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from fusedvlm.data.records import plain_image
from fusedvlm.files import parse_json
from fusedvlm.lazy import late_function

from .task import ImageData, Record

LETTERS = string.ascii_uppercase
LONGEST_NAME = 200  # characters of a picture's file name; every base64 is longer
LONGEST_REFERENCE = 64  # characters of an `image` cell that names another row
# Cells that pandas, and so VLMEvalKit, takes for missing.
MISSING = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
EMPTY = frozenset({""})
SAME = {"query": "question", "id": "index", "question_id": "index", "answers": "answer", "choices": "options"}
Row = Mapping[str, Any]
# `datasets` takes a second to import.
dataset_rows = late_function("fusedvlm.evaluation.tasks.dataset_rows", "dataset_rows")


@dataclass(frozen=True)
class RecordFile:
    """Where the questions of a task are.

    Args:
        name: of the task: the file's, or the dataset's, without folder and ending.
        path: a .tsv or .jsonl file, a folder written by `datasets`, or OWNER/NAME on the Hub.
        split: of a dataset.
        limit: first questions only.
        is_published: whether it is read as VLMEvalKit reads it: rows without a picture do not count, cells such as
            "None" are empty, and an answer that is no option makes the question unanswerable.
        default_question: where the file has no column of questions.
    """

    name: str
    path: str
    split: str = ""
    limit: int | None = None
    is_published: bool = False
    default_question: str = ""

    @property
    def missing(self) -> frozenset[str]:
        """Optional cells with these texts count as empty."""
        return MISSING if self.is_published else EMPTY

    def checksums(self) -> dict[str, str]:
        """SHA-256, and the MD5 that VLMEvalKit knows files by; both empty for what is no file."""
        path = Path(self.path)
        if not path.is_file():
            return {"sha256": "", "md5": ""}
        status = path.stat()
        return _checksums(str(path.resolve()), status.st_size, status.st_mtime_ns)

    def read(self) -> list[Record]:
        """All records.

        Raises:
            ValueError: naming file and row, for a missing column, an empty question, no answer, two rows of one index,
                or a picture that is none.
        """
        rows = list(_read_rows(self))
        if not rows:
            raise ValueError(f"{self.path}: holds no questions.")
        records = _RecordReader(self).read(rows)
        if len({record.index for record in records}) < len(records):
            seen: dict[str, str] = {}
            for record in records:
                first = seen.setdefault(record.index, record.place)
                if first != record.place:
                    raise ValueError(f"{self.path}, {record.place}: index {record.index!r} is that of {first}, too.")
        return records


class ImageStore:
    """Pictures in a temporary file, each once: benchmarks are larger than memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the records
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, data: bytes, name: str) -> ImageData:
        """Keep a picture.

        Raises:
            ValueError: for bytes that are no picture.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._places:
            _check_picture(data, name)
            self._file.seek(0, io.SEEK_END)
            self._places[digest] = self._file.tell(), len(data)
            self._file.write(data)
        return ImageData(digest, lambda: self._read(digest), name)

    def _read(self, digest: str) -> bytes:
        start, length = self._places[digest]
        self._file.seek(start)
        return self._file.read(length)


def _check_picture(data: bytes, name: str) -> None:
    try:
        Image.open(io.BytesIO(data)).close()  # the header alone
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"{name}: not a picture that can be read ({len(data)} bytes).") from None


class _RecordReader:
    """Rows to records."""

    def __init__(self, source: RecordFile) -> None:
        self.source, self.store = source, ImageStore()
        self.folder = Path(source.path).parent if Path(source.path).is_file() else Path(source.path)
        self.by_index: dict[str, tuple[ImageData, ...]] = {}

    def read(self, rows: list[tuple[str, Row]]) -> list[Record]:
        names = [str(row.get("index", number)) for number, (_, row) in enumerate(rows)]
        whole = {
            name: (place, row)
            for name, (place, row) in zip(names, rows, strict=True)
            if not self._reference(row) and not self._is_empty(row.get("image"))
        }
        records: list[Record] = []
        for name, (place, row) in zip(names, rows, strict=True):
            if self.source.is_published and self._is_empty(row.get("image", row.get("image_path"))):
                continue
            if self.source.limit is not None and len(records) >= self.source.limit:
                break
            where = f"{self.source.path}, {place}"
            try:
                records.append(self._record(name, row, whole, place))
            except (TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{where}: cannot be read ({type(error).__name__}: {error}).") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}"[:300]) from None
        return records

    def _record(self, name: str, row: Row, whole: Mapping[str, tuple[str, Row]], place: str) -> Record:
        question, options = row.get("question", self.source.default_question), self._options(row)
        if question is None or not str(question).strip():
            raise ValueError("the question is empty.")
        answers = _answers(row.get("answer"), options, must_be_option=not self.source.is_published)
        reference = self._reference(row)
        if reference:
            if reference not in whole:
                raise ValueError(f"its image is that of index {reference!r}, which has none.")
            images = self._images(reference, whole[reference][1])
        else:
            images = self._images(name, row)
        known = {"index", "image", "images", "question", "answer", "options", *LETTERS}
        fields = {key: str(value) for key, value in row.items() if key not in known and not self._is_empty(value)}
        return Record(name, str(question), answers, images, options, fields, place)

    def _is_empty(self, value: Any) -> bool:
        return value is None or (isinstance(value, str) and value in self.source.missing)

    def _reference(self, row: Row) -> str:
        """The index that an `image` cell names in place of a picture."""
        value = row.get("image")
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_REFERENCE or value in self.source.missing:
            return ""
        return "" if value.startswith("[") or (self.folder / value).is_file() else value

    def _options(self, row: Row) -> dict[str, str]:
        options = row.get("options")
        if isinstance(options, str) and not self._is_empty(options):
            options = ast.literal_eval(options)
        if isinstance(options, Mapping):
            return {str(letter): str(text) for letter, text in options.items()}
        if options is not None and not self._is_empty(options):
            return {letter: str(text) for letter, text in zip(LETTERS, options, strict=False)}
        return {letter: str(row[letter]) for letter in LETTERS if not self._is_empty(row.get(letter))}

    def _images(self, name: str, row: Row) -> tuple[ImageData, ...]:
        if name not in self.by_index:
            listed = row.get("images", row.get("image"))
            values = _listed(listed)
            if self._is_empty(listed) or not values:
                values = _listed(row.get("image_path"))
            self.by_index[name] = tuple(
                self.store.add(self._bytes(value), f"{'picture' if len(values) == 1 else f'picture {number}'}")
                for number, value in enumerate(values)
                if not self._is_empty(value)
            )
        return self.by_index[name]

    def _bytes(self, value: Any) -> bytes:
        if isinstance(value, Mapping) or not isinstance(value, (str, bytes)):
            value = plain_image(value)
        if isinstance(value, Image.Image):
            buffer = io.BytesIO()
            value.save(buffer, "PNG")
            return buffer.getvalue()
        if isinstance(value, bytes):
            return value
        text = str(value)
        if text.startswith(("http://", "https://")):
            raise ValueError(f"{text[:80]}: what an address shows may change; download the picture first.")
        if len(text) <= LONGEST_NAME and (self.folder / text).is_file():
            return (self.folder / text).read_bytes()
        try:
            return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"its picture {text[:60]!r} is neither a file in {self.folder} nor base64.") from None


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        value = ast.literal_eval(value)
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _answers(value: Any, options: Mapping[str, str], must_be_option: bool) -> tuple[str, ...]:
    """Right answers as text: of a choice the letter, also where the data has its number or its text."""
    if options and isinstance(value, int) and not isinstance(value, bool) and value < len(options):
        value = list(options)[value]
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        with contextlib.suppress(ValueError, SyntaxError):  # text in brackets
            value = ast.literal_eval(value)
    answers = [str(entry) for entry in value] if isinstance(value, (list, tuple)) else [str(value)]
    if value is None or not answers or not any(answer.strip() for answer in answers):
        raise ValueError("there is no answer to compare with.")
    if options and answers[0] not in options and must_be_option:
        by_text = {text: letter for letter, text in options.items()}
        if answers[0] not in by_text:
            raise ValueError(f"the answer {answers[0]!r:.60} is none of the options {', '.join(options)}.")
        answers = [by_text[answers[0]]]
    return tuple(answers)


# -- rows of each kind of file -----------------------------------------------------------------------------------------


def _read_rows(source: RecordFile) -> Iterator[tuple[str, Row]]:
    path = Path(source.path)
    if path.is_dir() or not path.exists():
        rows: Iterable[tuple[str, Row]] = dataset_rows(source.path, source.split, source.limit)
    elif path.suffix == ".tsv":
        rows = _tsv_rows(path, source)
    elif path.suffix in (".jsonl", ".json"):
        rows = _json_rows(path)
    else:
        raise ValueError(f"{path}: questions come from .tsv and .jsonl files; this is {path.suffix or 'neither'}.")
    for place, row in rows:
        # A column under another name counts where the usual one is missing.
        yield place, {**{name: row[other] for other, name in SAME.items() if other in row and name not in row}, **row}


def _tsv_rows(path: Path, source: RecordFile) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        try:
            header = next(reader, [])
            there = {
                *header,
                *(SAME.get(name, name) for name in header),
                *(["question"] if source.default_question else []),
            }
            missing = [name for name in ("question", "answer") if name not in there]
            if missing or len(set(header)) < len(header):
                what = f"no column {missing[0]!r}" if missing else "a column that is there twice"
                raise ValueError(f"{path}: {what}; the header is {', '.join(header)[:120]}.")
            for number, cells in enumerate(reader, 2):
                if len(cells) != len(header):
                    raise ValueError(f"{path}, row {number}: {len(cells)} cells for {len(header)} columns.")
                yield f"row {number}", dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: damaged ({error}).") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path}, row {number}")
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {number}: must hold keys and values, not {type(row).__name__}.")
            yield f"row {number}", row


@lru_cache(maxsize=64)
def _checksums(path: str, size: int, changed: int) -> dict[str, str]:
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            for digest in digests.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}

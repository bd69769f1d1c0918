"""Typed score records and their strict reader: a bad row is an error that names the row, never a silent gap."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER = "paper"
PAPER_SCORES = Path(__file__).parent / "results_by_m.csv"
REQUIRED = ("benchmark", "metric", "m", "score")


@dataclass(frozen=True)
class ScoreRecord:
    """One score at one number of visual tokens.

    `groups` are the remaining columns as (name, value) pairs, in file order; scores are compared only within a group.
    `place` says where the record was read ("row 12"), for messages.
    """

    benchmark: str
    metric: str
    m: int
    score: float
    groups: tuple[tuple[str, str], ...] = ()
    place: str = ""

    @property
    def key(self) -> tuple:
        """What makes a curve: benchmark, metric and groups."""
        return (self.benchmark, self.metric, self.groups)

    def column(self, name: str) -> str:
        """Value of a column as text, for exclusions. Raises `KeyError` for a column that the record lacks."""
        return {"benchmark": self.benchmark, "metric": self.metric, "m": str(self.m), **dict(self.groups)}[name]


@dataclass(frozen=True)
class Curve:
    """Scores of one benchmark, metric and group against m, sorted by m; `excluded` is kept to be drawn hollow."""

    benchmark: str
    metric: str
    groups: tuple[tuple[str, str], ...]
    points: tuple[ScoreRecord, ...]
    excluded: tuple[ScoreRecord, ...] = ()

    @property
    def name(self) -> str:
        """Benchmark/metric and group values in one line."""
        values = ", ".join(value for _, value in self.groups)
        return f"{self.benchmark}/{self.metric}" + (f" ({values})" if values else "")

    @property
    def m(self) -> list[int]:
        """Numbers of visual tokens of the fitted points."""
        return [point.m for point in self.points]

    @property
    def scores(self) -> list[float]:
        """Scores of the fitted points."""
        return [point.score for point in self.points]

    @property
    def columns(self) -> dict[str, str]:
        """Benchmark, metric and grouping columns, for flat records."""
        return {"benchmark": self.benchmark, "metric": self.metric, **dict(self.groups)}


def read_scores(source: str | Path, ignore: Sequence[str] = ()) -> list[ScoreRecord]:
    """Read scores from a CSV file, a JSON list of objects, an evaluation's results.json, or "paper".

    CSV needs columns benchmark, metric, m, score; lines that start with "#" are comments; every further column groups,
    unless it is in `ignore`. In a results.json, `task` is the benchmark and the metric is "score".

    Args:
        source: path, or "paper" for the scores the paper reports ("Scaling Capability in Token Space").
        ignore: names of columns that do not group, such as a standard error.

    Raises:
        ValueError: for a missing column, a value that is not a positive number, or a duplicate; the row is named.
        OSError: when the file cannot be read.
    """
    path = PAPER_SCORES if str(source) == PAPER else Path(source)
    text = _read_text(path)
    rows = _json_rows(text, path) if path.suffix == ".json" else _csv_rows(text, path)
    records = [_record(cells, place, path, ignore) for place, cells in rows]
    if not records:
        raise ValueError(f"{path}: no scores in it.")
    _refuse_duplicates(records, path)
    return records


def group_curves(records: Iterable[ScoreRecord], exclude: Sequence[str] = ()) -> list[Curve]:
    """Sort records into curves.

    Args:
        records: from `read_scores`.
        exclude: points to leave out of the fits, each as "column=value,column=value", alternatives with "|":
            "benchmark=RealWorldQA,m=384|512". A curve left without points is dropped.

    Raises:
        ValueError: when an exclusion names no column or matches no point, a curve is left with a single m, or nothing
            is left.
    """
    records = list(records)
    dropped = set().union(*(points_matching(records, rule) for rule in exclude))
    curves: dict[tuple, list[ScoreRecord]] = {}
    for record in records:
        curves.setdefault(record.key, []).append(record)
    left = [members for members in curves.values() if not dropped.issuperset(members)]
    if not left:
        raise ValueError("The exclusions leave no point.")
    return [_curve(sorted(members, key=lambda record: record.m), dropped) for members in left]


def _curve(members: list[ScoreRecord], dropped: set[ScoreRecord]) -> Curve:
    kept = tuple(record for record in members if record not in dropped)
    first = members[0]
    curve = Curve(first.benchmark, first.metric, first.groups, kept, tuple(r for r in members if r in dropped))
    if len({record.m for record in kept}) < 2:
        places = ", ".join(record.place for record in members)
        grouping = ", ".join(name for name, _ in first.groups)
        hint = f" Columns that group: {grouping}; ignore those that should not." if grouping else ""
        raise ValueError(
            f"{curve.name} ({places}): only {len(kept)} number of visual tokens is left; a fit needs two.{hint}"
        )
    return curve


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _csv_rows(text: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, cells) for each row; the row number is the line number in the file."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"]
    if not lines:
        raise ValueError(f"{path}: empty; it needs a header with the columns {', '.join(REQUIRED)}.")
    header = _cells(lines[0][1])
    _check_columns(header, f"{path}, row {lines[0][0]}")
    rows = []
    for number, line in lines[1:]:
        cells = _cells(line)
        if len(cells) != len(header):
            raise ValueError(f"{path}, row {number}: {len(cells)} cells for {len(header)} columns ({line!r}).")
        rows.append((f"row {number}", dict(zip(header, cells, strict=True))))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader(io.StringIO(line)))]


def _check_columns(header: Iterable[str], where: str) -> None:
    names = ["m" if name == "num_visual_tokens" else name for name in header]
    if missing := [name for name in REQUIRED if name not in names]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; there are {', '.join(header)}.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where}: column {', '.join(repeated)} appears twice.")


def _json_rows(text: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if isinstance(document, dict) and isinstance(document.get("scores"), list):
        return [(f"row {i}", _evaluation_row(row, f"{path}, row {i}")) for i, row in enumerate(document["scores"], 1)]
    if not isinstance(document, list):
        raise ValueError(f"{path}: expected a list of objects or a results file with a list `scores`.")
    for number, row in enumerate(document, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected an object, got {row!r}.")
        _check_columns(row, f"{path}, row {number}")
    return [(f"row {number}", row) for number, row in enumerate(document, 1)]


def _evaluation_row(row: dict, where: str) -> dict[str, Any]:
    """A row of `fusedvlm.evaluation`'s results file."""
    if missing := [name for name in ("task", "num_visual_tokens", "score") if name not in row]:
        raise ValueError(f"{where}: no {', '.join(missing)}.")
    return {"benchmark": row["task"], "metric": "score", "m": row["num_visual_tokens"], "score": row["score"]}


def _record(cells: dict[str, Any], place: str, path: Path, ignore: Sequence[str]) -> ScoreRecord:
    where = f"{path}, {place}"
    cells = {"m" if name == "num_visual_tokens" else name: value for name, value in cells.items()}
    m = _positive(cells["m"], "m", where)
    if m != int(m):
        raise ValueError(f"{where}: m is {cells['m']!r}; it is a whole number of visual tokens.")
    if empty := [name for name in ("benchmark", "metric") if str(cells[name]).strip() == ""]:
        raise ValueError(f"{where}: {', '.join(empty)} is empty.")
    groups = tuple((n, str(v)) for n, v in cells.items() if n not in REQUIRED and n not in ignore)
    score = _positive(cells["score"], "score", where)
    return ScoreRecord(str(cells["benchmark"]), str(cells["metric"]), int(m), score, groups, place)


def _positive(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {name} is {value!r}, not a number.") from None
    if not math.isfinite(number) or number <= 0 or isinstance(value, bool):
        raise ValueError(
            f"{where}: {name} is {value!r}; a power law has no place for zero, negative or missing values. "
            "Remove the row or correct it."
        )
    return number


def _refuse_duplicates(records: list[ScoreRecord], path: Path) -> None:
    seen: dict[tuple, ScoreRecord] = {}
    for record in records:
        first = seen.setdefault((record.key, record.m), record)
        if first is not record:
            name = _curve_name(record)
            raise ValueError(f"{path}, {record.place}: duplicate of {first.place} ({name} at m={record.m}).")


def _curve_name(record: ScoreRecord) -> str:
    return Curve(record.benchmark, record.metric, record.groups, ()).name


def points_matching(records: Sequence[ScoreRecord], rule: str) -> set[ScoreRecord]:
    """Records that an exclusion such as "benchmark=RealWorldQA,m=384|512" names.

    Raises:
        ValueError: for an unknown column, or when nothing matches.
    """
    columns = ["benchmark", "metric", "m", *(name for name, _ in records[0].groups)] if records else []
    wanted = _parse_rule(rule, columns)
    hits = {r for r in records if all(r.column(name) in values for name, values in wanted.items())}
    if not hits:
        raise ValueError(f"Exclusion {rule!r} matches no point.")
    return hits


def _parse_rule(rule: str, columns: list[str]) -> dict[str, list[str]]:
    wanted = {}
    for part in rule.split(","):
        name, equals, values = part.partition("=")
        if not equals or name.strip() not in columns:
            raise ValueError(
                f"Exclusion {rule!r}: {part!r} is not column=value with a column of {', '.join(columns)}; "
                "for example benchmark=RealWorldQA,m=384|512."
            )
        wanted[name.strip()] = [value.strip() for value in values.split("|")]
    return wanted

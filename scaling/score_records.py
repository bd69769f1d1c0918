"""Typed score records and their strict reader: a bad row is an error that names the row, never a silent gap."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusedvlm.console import say
from fusedvlm.files import check_columns, read_json, read_table
from fusedvlm.question_scores import questions_file, read_question_scores

PAPER = "paper"
PAPER_SCORES = Path(__file__).parent / "results_by_m.csv"
REQUIRED = ("benchmark", "metric", "m", "score")
SAME = {"num_visual_tokens": "m"}
SEED = "seed"  # the column that tells trainings apart
# Columns about a score that do not group: its standard error, and of how many questions it is the mean.
ABOUT = ("standard_error", "count", "maximum")


@dataclass(frozen=True)
class ScoreRecord:
    """One score at one number of visual tokens.

    `groups` are the remaining columns as (name, value) pairs, in file order; scores are compared only within a group.
    `place` says where the record was read ("row 12"), for messages; `standard_error` is None where none was stated;
    `question_scores` are those behind the score, where they were kept.
    """

    benchmark: str
    metric: str
    m: int
    score: float
    groups: tuple[tuple[str, str], ...] = ()
    place: str = ""
    standard_error: float | None = None
    question_scores: tuple[float, ...] = ()

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
    def errors(self) -> list[float] | None:
        """Standard errors of the fitted points; None unless every one has its own."""
        found = [point.standard_error for point in self.points]
        stated = [error for error in found if error is not None]
        return stated if len(stated) == len(found) else None

    @property
    def question_scores(self) -> np.ndarray | None:
        """(points, questions) of the fitted points; None unless all have those of the same number of questions."""
        counts = {len(point.question_scores) for point in self.points}
        return None if counts & {0, 1} or len(counts) != 1 else np.array([p.question_scores for p in self.points])

    @property
    def columns(self) -> dict[str, str]:
        """Benchmark, metric and grouping columns, for flat records."""
        return {"benchmark": self.benchmark, "metric": self.metric, **dict(self.groups)}


def read_scores(source: str | Path, ignore: Sequence[str] = ()) -> list[ScoreRecord]:
    """Read scores from a CSV file, a JSON list of objects, an evaluation's results.json, or "paper".

    CSV needs columns benchmark, metric, m, score; lines that start with "#" are comments; `standard_error` and `count`
    (of the questions) belong to the score; every further column groups, unless it is in `ignore`. In a results.json,
    `task` is the benchmark and the metric is "score".

    Args:
        source: path, or "paper" for the scores the paper reports ("Scaling Capability in Token Space").
        ignore: names of columns that do not group, such as a standard error.

    Raises:
        ValueError: for a missing file or column, a value that is not a positive number, or a duplicate; the row is
            named.
    """
    path = PAPER_SCORES if str(source) == PAPER else Path(source)
    document = read_json(path, None) if path.suffix == ".json" else None
    if isinstance(document, dict) and isinstance(document.get("scores"), list):
        records, left_out = evaluation_records(document, path, ignore)
        for label, reason in left_out.items():
            say(f"{path}: {label} is left out: {reason}.")
        if not records:
            raise ValueError(f"{path}: no score in it can be fitted ({next(iter(left_out.values()), 'it has none')}).")
        return records
    rows = _json_rows(path) if path.suffix == ".json" else read_table(path, REQUIRED, SAME)
    records = [_record(cells, place, path, ignore) for place, cells in rows]
    if not records:
        raise ValueError(f"{path}: no scores in it.")
    _refuse_duplicates(records, path)
    return records


def read_trainings(sources: Sequence[str | Path], ignore: Sequence[str] = ()) -> list[ScoreRecord]:
    """Scores of one file, or of several trainings, told apart by a column `seed`: what differs in their paths.

    Raises:
        ValueError: as `read_scores`; for a file that is named twice, or has a column `seed` of its own.
    """
    if len(sources) == 1:
        return read_scores(sources[0], ignore)
    names = _distinct_names([str(source) for source in sources])
    records = []
    for source, name in zip(sources, names, strict=True):
        found = read_scores(source, ignore)
        if any(column == SEED for column, _ in found[0].groups):
            raise ValueError(f"{source} has a column {SEED} already; fit it alone, or ignore the column.")
        records += [
            replace(record, groups=((SEED, name), *record.groups), place=f"{source}, {record.place}")
            for record in found
        ]
    return records


def _distinct_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path in which they all differ, "seed0" of "runs/seed0/results.json"; else whole paths."""
    if len(set(sources)) < len(sources):
        twice = next(source for source in sources if sources.count(source) > 1)
        raise ValueError(f"{twice} is named twice.")
    parts = [Path(source).parts for source in sources]
    for place in range(1, min(map(len, parts)) + 1):
        if len(names := {path[-place] for path in parts}) == len(sources) and len(names) > 1:
            return [path[-place] for path in parts]
    return list(sources)


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


def evaluation_records(
    document: dict[str, Any], path: Path, ignore: Sequence[str] = ()
) -> tuple[list[ScoreRecord], dict[str, str]]:
    """Records of `fusedvlm.evaluation`'s results file, with the scores of single questions where they lie beside it.

    Args:
        document: what the file holds.
        path: of the file.
        ignore: as in `read_scores`.

    Returns:
        The records, and {name of a score: why it is left out}: zero somewhere, or measured at a single m.

    Raises:
        ValueError: for a row that is none, two scores of one name at one m, or single scores that belong to others.
    """
    rows = [(f"row {n}", _evaluation_row(row, f"{path}, row {n}")) for n, row in enumerate(document["scores"], 1)]
    labels = [_row_label(cells) for _, cells in rows]
    left_out: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        own = [cells for name, (_, cells) in zip(labels, rows, strict=True) if name == label]
        if any(isinstance(cells["score"], (int, float)) and cells["score"] == 0 for cells in own):
            left_out[label] = "a score of zero, which no power law fits"
        elif len({cells["m"] for cells in own}) < 2 and len(set(labels)) > 1:
            left_out[label] = "measured at one m alone"
    kept = [row for name, row in zip(labels, rows, strict=True) if name not in left_out]
    records = [_record(cells, place, path, ignore) for place, cells in kept]
    _refuse_duplicates(records, path)
    if not questions_file(path).exists():
        return records, left_out
    means = {(label, cells["m"]): cells["score"] for label, (_, cells) in zip(labels, rows, strict=True)}
    single = read_question_scores(path, means)
    return [
        replace(record, question_scores=tuple(single.get(_row_label(cells), {}).get(record.m, ())))
        for record, (_, cells) in zip(records, kept, strict=True)
    ], left_out


def _row_label(cells: dict[str, Any]) -> str:
    """As `fusedvlm.evaluation.results.TaskScore.label` of the row."""
    metric = "" if cells["metric"] == "score" else f" {cells['metric']}"
    harness = f" [{cells['harness']}]" if cells.get("harness") else ""
    note = f" ({cells['note']})" if cells.get("note") else ""
    return f"{cells['benchmark']}{metric}{harness}{note}"


def _json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    document = read_json(path, None)
    if not isinstance(document, list):
        raise ValueError(f"{path}: expected a list of objects or a results file with a list `scores`.")
    for number, row in enumerate(document, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected an object, got {row!r}.")
    return [
        (f"row {i}", dict(zip(check_columns(row, REQUIRED, f"{path}, row {i}", SAME), row.values(), strict=True)))
        for i, row in enumerate(document, 1)
    ]


def _evaluation_row(row: dict, where: str) -> dict[str, Any]:
    """A row of `fusedvlm.evaluation`'s results file."""
    if missing := [name for name in ("task", "num_visual_tokens", "score") if name not in row]:
        raise ValueError(f"{where}: no {', '.join(missing)}.")
    about = {name: row[name] for name in ABOUT if row.get(name) is not None}
    if ".." in str(row.get("scale", "")):
        about["maximum"] = str(row["scale"]).rpartition("..")[2]
    # What sets scores apart groups them; what was measured by another tool, or in part, never joins a curve unmarked.
    apart = {name: row[name] for name in ("harness", "note") if row.get(name) not in (None, "", "local")}
    named = {"benchmark": row["task"], "metric": row.get("metric", "score")}
    return {**named, "m": row["num_visual_tokens"], "score": row["score"], **about, **apart}


def _record(cells: dict[str, Any], place: str, path: Path, ignore: Sequence[str]) -> ScoreRecord:
    where = f"{path}, {place}"
    m = _positive(cells["m"], "m", where)
    if m != int(m):
        raise ValueError(f"{where}: m is {cells['m']!r}; it is a whole number of visual tokens.")
    if empty := [name for name in ("benchmark", "metric") if str(cells[name]).strip() == ""]:
        raise ValueError(f"{where}: {', '.join(empty)} is empty.")
    groups = tuple((n, str(v)) for n, v in cells.items() if n not in (*REQUIRED, *ABOUT) and n not in ignore)
    score = _positive(cells["score"], "score", where)
    about = {name: cells[name] for name in ABOUT if name not in ignore and str(cells.get(name, "")).strip() != ""}
    error = stated_error(score, about, where)
    return ScoreRecord(str(cells["benchmark"]), str(cells["metric"]), int(m), score, groups, place, error)


def stated_error(score: float, about: dict[str, Any], where: str) -> float | None:
    """The stated error. One of zero, of questions that were all answered alike, becomes that of one success and one
    failure more (Agresti and Coull): nothing is known exactly from a sample."""
    if "standard_error" not in about:
        return None
    try:
        error, count = float(about["standard_error"]), float(about.get("count", 0))
        most = float(about.get("maximum", 1))
    except (TypeError, ValueError):
        raise ValueError(f"{where}: standard_error is {about['standard_error']!r}, not a number.") from None
    if not math.isfinite(error) or error < 0:
        raise ValueError(f"{where}: standard_error is {error:g}; it is zero or more.")
    if error == 0 and count >= 1 and score <= most:
        share = (score / most * count + 1) / (count + 2)
        return most * math.sqrt(share * (1 - share) / count)
    return error or None


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

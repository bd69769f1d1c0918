"""A card back to what it shows, and the comparison with its facts.

Numbers are parsed and compared with the facts themselves, not with the text they were printed from: a card passes when
each number it shows is the measured one to the digits shown.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard

from fusedvlm.hub_cards.facts import CardFacts, mean_scores

from .card_tables import MISSING, glance, render_title
from .metadata import card_metadata

GLANCE, FAMILY = "At a glance", "The family"
LINK = re.compile(r"^\[(.*)\]\((.*)\)$")


@dataclass(frozen=True)
class Shown:
    """What a card shows.

    Args:
        title: its first heading.
        metadata: the metadata block as plain data.
        glance: label -> text of the at-a-glance table.
        columns: of the family table.
        family: its rows, {column: text}.
        current: m of the row in bold.
    """

    title: str
    metadata: dict[str, Any]
    glance: dict[str, str]
    columns: list[str]
    family: list[dict[str, str]]
    current: list[str]


def read_back(text: str) -> Shown:
    """Parse a card.

    Raises:
        ValueError: when it has no readable metadata or lacks one of its two tables.
    """
    try:
        metadata = ModelCard(text).data.to_dict()
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata block cannot be read ({str(error).splitlines()[0]})") from error
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    glance = {row[0]: row[1] for row in _table(text, GLANCE)[1:]}
    header, *rows = _table(text, FAMILY)
    bold = [row[0].strip("*") for row in rows if row[0].startswith("**")]
    family = [
        dict(zip(header, (entry.removeprefix("**").removesuffix("**") for entry in row), strict=True)) for row in rows
    ]
    for row in family:
        if link := LINK.match(row.get("repository", "")):
            name, target = link.groups()
            row["repository"] = name if target == f"https://huggingface.co/{name}" else f"{name} at {target}"
    return Shown(html.unescape(title.group(1)) if title else "", metadata, glance, header, family, bold)


def _table(text: str, heading: str) -> list[list[str]]:
    """Header and rows of the first table under a heading, cells unescaped. Raises `ValueError` without one."""
    part = re.split(rf"^## {re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)
    if len(part) < 2:
        raise ValueError(f"the section {heading!r} is missing")
    section = re.split(r"^## ", part[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[html.unescape(entry.strip()) for entry in line.strip("|").split("|")] for line in lines]
    if len(rows) < 3 or len({len(row) for row in rows}) != 1:
        raise ValueError(f"the table under {heading!r} is missing or its rows differ in length")
    return [rows[0], *rows[2:]]


def differences(text: str, facts: CardFacts) -> list[str]:
    """Where a card shows something else than its facts, one line each; empty when it says what they say."""
    try:
        shown = read_back(text)
    except ValueError as error:
        return [str(error)]
    found = []
    if shown.title != render_title(facts):
        found.append(f"the title is {shown.title!r}")
    found += [f"metadata: {what}" for what in _metadata_differences(shown.metadata, facts)]
    expected = {_plain(label): _plain(value) for label, value in glance(facts).items()}
    found += [
        f"at a glance, {label}: {shown.glance.get(label, 'missing')!r} is not {expected.get(label, 'a fact')!r}"
        for label in [*expected, *(label for label in shown.glance if label not in expected)]
        if shown.glance.get(label) != expected.get(label)
    ]
    if shown.current != [str(facts.m)]:
        found.append(f"the family table marks {shown.current or 'nothing'}, not m = {facts.m}")
    return found + list(_family_differences(shown, facts))


def _plain(text: str) -> str:
    """As text comes back from a table cell: no line breaks, single spaces."""
    return " ".join(text.split())


def _metadata_differences(shown: dict[str, Any], facts: CardFacts) -> Iterator[str]:
    expected = yaml.safe_load(card_metadata(facts))
    for key in sorted({*shown, *expected}):
        if shown.get(key) != expected.get(key):
            yield f"{key} is {shown.get(key)!r} in the card, {expected.get(key)!r} by the facts"
    measured = facts.measured.scores if facts.measured else []
    scores = {_plain(row.label): row.score for row in measured if row.num_visual_tokens == facts.m}
    listed = {
        result["dataset"]["name"]: result["metrics"][0]["value"]
        for model in shown.get("model-index") or ()
        for result in model["results"]
    }
    if listed != scores:
        yield f"model-index has the scores {listed}, measured were {scores}"


def _family_differences(shown: Shown, facts: CardFacts) -> Iterator[str]:
    """Every cell of the family table against the facts; a dash must mean that there is none."""
    expected = _family_facts(facts)
    rows = {row["m"]: row for row in shown.family if "m" in row}
    if sorted(rows) != sorted(map(str, expected)) or len(rows) != len(shown.family):
        yield f"the family table has rows for m = {', '.join(sorted(rows))}, the facts for {sorted(expected)}"
        return
    for m, values in expected.items():
        row = rows[str(m)]
        if set(row) - {"m"} != {_plain(column) for column in values}:
            yield f"the family table has the columns {sorted(row)}, the facts {sorted(values)}"
            return
        for column, value in values.items():
            if not _same(row[_plain(column)], value):
                yield f"the family table shows {row[_plain(column)]!r} for {column} at m = {m}, the facts say {value!r}"


def _family_facts(facts: CardFacts) -> dict[int, dict[str, Any]]:
    """{m: {column: number, (number, number), text or None}} straight from the facts."""
    scores = facts.measured.scores if facts.measured else []
    latencies = {row.num_visual_tokens: row for row in facts.measured.latencies} if facts.measured else {}
    means, control = mean_scores(facts.measured), mean_scores(facts.control)
    repos = {neighbor.num_visual_tokens: neighbor.repo_id for neighbor in facts.family}
    table: dict[int, dict[str, Any]] = {}
    for m in {*repos, *latencies, *(row.num_visual_tokens for row in scores)}:
        timing = latencies.get(m)
        table[m] = {
            "repository": repos.get(m),
            "mean": means.get(m),
            "mean, images swapped": control.get(m),
            **dict.fromkeys(sorted({row.label for row in scores})),
            **{
                row.label: row.score if row.standard_error is None else (row.score, row.standard_error)
                for row in scores
                if row.num_visual_tokens == m
            },
            "first token, ms": timing and 1e3 * timing.time_to_first_token,
            "answer, ms": timing and 1e3 * timing.seconds_per_answer,
        }
    return table


def _same(shown: str, value: Any) -> bool:
    """Whether a cell shows a value, to the digits that it has."""
    if value is None:
        return shown == MISSING
    if isinstance(value, str):
        return shown == value
    numbers = value if isinstance(value, tuple) else (value,)
    texts = shown.split(" ± ")
    return len(texts) == len(numbers) and all(
        re.fullmatch(r"-?\d+\.\d+", text) is not None
        and abs(float(text) - number) <= 0.500001 * 10.0 ** -len(text.partition(".")[2])
        for text, number in zip(texts, numbers, strict=True)
    )

"""Facts to a model card, and the card back to what it shows.

Rendering is pure: a template and facts, no network, no clock. Every rendered card is read back and compared with its
facts before anybody sees it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from fusedvlm.hub_cards.facts import CardFacts, mean_scores
from fusedvlm.hub_cards.licenses import noncommercial, terms_of
from fusedvlm.templates import load_template

from .card_tables import MISSING, family_table, glance, render_title
from .metadata import card_metadata
from .readback import differences

LARGE = 50_000_000  # parameters of a language model that somebody may want in four bits
TEMPLATES = Path(__file__).parents[1] / "templates"
# In a table cell these would be markup; as entities they are themselves.
MARKUP = {character: f"&#{ord(character)};" for character in "|`*[]{}<>\\~#!"}


def cell(value: Any) -> str:
    """Any text as one table cell or one line: markup becomes entities, line breaks become spaces."""
    text = " ".join(str(value).split()).replace("&", "&amp;")
    return "".join(MARKUP.get(character, character) for character in text)


def prose(text: str) -> str:
    """Paragraphs of a user's own text: emphasis, links and lists stay; HTML, images, headings, rules and tables do
    not."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("{", "&#123;").replace("}", "&#125;")
    text = text.replace("![", "!\\[")
    lines = [
        re.sub(r"^(\s*)(?=[#|>=`~]|-{2,}\s*$|_{3,}\s*$|\*{3,}\s*$)", r"\1\\", line.rstrip())
        for line in text.strip().splitlines()
    ]
    return "\n".join(lines)


def link(target: str) -> str:
    """The target of a link, safe inside parentheses."""
    return quote(target, safe=":/?#=&%+,;@~.-_")


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def card_template(name: str, lstrip_blocks: bool = False) -> jinja2.Template:
    """One of the templates of hub_cards, with the filters of this module."""
    filters = {"cell": cell, "prose": prose, "fenced": fenced, "link": link}
    return load_template(TEMPLATES / name, lstrip_blocks=lstrip_blocks, filters=filters)


def render_card(facts: CardFacts) -> str:
    """The card of a variant.

    Raises:
        ValueError: when what the card shows is not what the facts say.
    """
    text = card_template("model_card.md.jinja", lstrip_blocks=True).render(**_view(facts))
    if found := differences(text, facts):
        raise ValueError(f"The card of {facts.repo_id} would not say what its facts do: {found[0]}.")
    return text


def _view(facts: CardFacts) -> dict[str, Any]:
    """What the template needs, as text or lists of text; escaping is the template's."""
    means = mean_scores(facts.measured)
    latencies = facts.measured.latencies if facts.measured else ()
    return {
        "facts": facts,
        "stated": facts.stated,
        "counted": facts.counted,
        "measured": facts.measured,
        "metadata": card_metadata(facts),
        "title": render_title(facts),
        "m": facts.m,
        "largest": max(facts.counted.trained_num_visual_tokens),
        "other_m": _other_m(facts),
        "possible": possible_counts(facts.counted.possible_num_visual_tokens),
        "glance": glance(facts),
        "family": family_table(facts),
        "means": means,
        "enough": _enough(means),
        "score_plot": len(means) > 1,
        "latency_plot": len(latencies) > 1,
        "counts": sorted({score.count for score in facts.measured.scores}) if facts.measured else [],
        "training": _training(facts),
        "noncommercial": noncommercial(facts.stated),
        "terms": terms_of(facts.stated.license),
        "missing": MISSING,
        "example": facts.example,
        "shown_answers": _shown_answers(facts),
        "large": counted_language_model(facts) >= LARGE,
        "target_modules": r".*fuser.*\.(q_proj|v_proj)",
    }


def _other_m(facts: CardFacts) -> int:
    """Another m to show the dial with, half of this one or next below; this one where there is no other."""
    half, possible = max(1, facts.m // 2), facts.counted.possible_num_visual_tokens
    return max((m for m in possible if m <= half), default=min(possible)) if possible else half


def possible_counts(counts: Sequence[int]) -> str:
    """Every m as text: a list, or a range where there is none missing between."""
    if len(counts) > 2 and list(counts) == list(range(counts[0], counts[-1] + 1)):
        return f"every m from {counts[0]} to {counts[-1]}"
    return "m = " + ", ".join(map(str, counts))


def counted_language_model(facts: CardFacts) -> int:
    """Parameters of the language model."""
    return sum(count for group, count in facts.counted.parameters.items() if "language" in group)


def _shown_answers(facts: CardFacts) -> list[tuple[int, str]]:
    """Two of the example's answers: at the fewest visual tokens, and at this variant's own m or the most."""
    answers = {answer.num_visual_tokens: answer.text for answer in facts.example.answers} if facts.example else {}
    if not answers:
        return []
    own = facts.m if facts.m in answers and facts.m != min(answers) else max(answers)
    return [(m, answers[m]) for m in sorted({min(answers), own})]


def _enough(means: Mapping[int, float]) -> int | None:
    """The smallest m with at least nine tenths of the best mean score."""
    return next((m for m, mean in means.items() if mean >= 0.9 * max(means.values())), None) if means else None


def _training(facts: CardFacts) -> dict[str, list[tuple[str, str]]]:
    """Tables of the training section: heading of the first column -> rows; empty ones left out."""
    record = facts.training or {}
    about = {key: value for key, value in record.items() if key not in ("settings", "stages", "data")}
    tables = {
        "the run": _scalars(about),
        "setting": _scalars(record.get("settings")),
        "recorded by the run": _scalars(record.get("stages")),
    }
    return {heading: rows for heading, rows in tables.items() if rows}


def _scalars(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as flat (name, value) rows."""
    if not isinstance(values, Mapping):
        return [] if values is None else [(prefix or "all of it", str(values))]
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _scalars(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows

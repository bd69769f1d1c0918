"""License texts in a repository against what its facts say: there, whole, and those of the license that is named."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fusedvlm.hub_cards.facts import CardFacts
from fusedvlm.hub_cards.licenses import APACHE, APACHE_TEXT, CODE_LICENSE, expected_notice, terms_of

SHORTEST_TEXT = 200  # characters; no license is shorter
SHORTEST_AGREEMENT = 5_000
# What the text of a license says and no other does, by the beginning of the license's name on the Hub; lower case.
PHRASES = {
    "apache-2.0": "apache license version 2.0",
    "mit": "permission is hereby granted, free of charge",
    "bsd": "redistribution and use in source and binary forms",
    "isc": "permission to use, copy, modify, and/or distribute",
    "gpl": "gnu general public license",
    "lgpl": "gnu lesser general public license",
    "agpl": "gnu affero general public license",
    "mpl-2.0": "mozilla public license",
    "cc-by-nc": "noncommercial",
    "cc-by": "attribution",
    "cc0": "cc0",
    "unlicense": "free and unencumbered software",
    "openrail": "rail",
    "creativeml-openrail": "rail",
    "bigscience": "rail",
    "bigcode": "rail",
}


def license_problems(facts: CardFacts, files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of license and notice texts.

    Args:
        facts: of the variant, whose licenses are consistent.
        files: {path in the repository: file}; the texts must be UTF-8.
    """
    stated = facts.stated
    named = [name for name in stated.license_files if name in files]
    texts = {name: files[name].read_text(encoding="utf-8") for name in named}
    for name, text in texts.items():
        if len(text.strip()) < SHORTEST_TEXT and name != "NOTICE":
            yield name, f"has {len(text.strip())} characters, which is no text of a license"
    if CODE_LICENSE in texts and _plain(texts[CODE_LICENSE]) != _plain(APACHE_TEXT.read_text(encoding="utf-8")):
        yield CODE_LICENSE, "is not the Apache License 2.0 that the Python files are under"
    yield from _license_text(stated.license, texts)
    notice = expected_notice(stated, facts.counted)
    if notice and "NOTICE" not in texts:
        yield "NOTICE", "missing, though the license or the vision tower asks for one"
    elif notice and (terms := terms_of(stated.license)) is None and _plain(notice) not in _plain(texts["NOTICE"]):
        yield "NOTICE", "lacks what must be said about the vision tower"
    elif notice and terms is not None and _plain(terms.notice) not in _plain(texts["NOTICE"]):
        yield "NOTICE", "lacks the sentence that the license asks for"


def _license_text(license: str | None, texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    terms = terms_of(license)
    if "LICENSE" not in texts:
        if terms is not None or license == APACHE:
            yield "LICENSE", f"missing, though the weights are under {license}"
        return
    text = _plain(texts["LICENSE"])
    if terms is not None:
        if terms.phrase not in text or len(text) < SHORTEST_AGREEMENT:
            yield "LICENSE", f"does not read like the whole {terms.title}"
        return
    starts = sorted((start for start in PHRASES if (license or "").startswith(start)), key=len)
    if starts and PHRASES[starts[-1]] not in text:
        yield "LICENSE", f"does not read like {license}, which the card names"


def _plain(text: str) -> str:
    """Words alone, in lower case: line breaks and commas of a heading differ between copies."""
    return " ".join(text.lower().replace(", version", " version").split())

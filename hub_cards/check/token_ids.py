"""Token ids of a variant: configuration, processor, generation settings and tokenizers must mean the same tokens."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VOCABULARY, QUERY_VOCABULARY = "tokenizer.json", "query_tokenizer/tokenizer.json"


def token_problems(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) where an id stands for another token than it should.

    Args:
        files: {path in the repository: file} of a variant; a vocabulary that is kept in another format is not read.
    """
    config, processor = _read(files, "config.json"), _read(files, "processor_config.json")
    generation, tokenizer = _read(files, "generation_config.json"), _read(files, "tokenizer_config.json")
    image_id = config.get("image_token_id")
    if (suppressed := generation.get("suppress_tokens")) is not None and image_id not in _many(suppressed):
        yield "generation_config.json", f"suppress_tokens does not hold the placeholder's id {image_id}"
    if VOCABULARY in files:
        ids = vocabulary(files[VOCABULARY])
        named = {name: _token(tokenizer.get(f"{name}_token")) for name in ("bos", "eos")}
        yield from _image_problems(ids, processor.get("image_token"), image_id)
        yield from _generation_problems(ids, named, generation)
    if QUERY_VOCABULARY in files:
        yield from _query_problems(vocabulary(files[QUERY_VOCABULARY]), config)


def _image_problems(ids: Mapping[str, int], token: Any, image_id: Any) -> Iterator[tuple[str, str]]:
    token = _token(token)
    if token is not None and ids.get(token) != image_id:
        yield "config.json", f"image_token_id is {image_id}, the tokenizer's {token!r} is {ids.get(token)}"


def _generation_problems(ids: Mapping[str, int], named: Mapping[str, Any], settings: dict) -> Iterator[tuple[str, str]]:
    """An answer ends where the tokenizer says that one ends, and begins with its first token."""
    for name, token in named.items():
        stated, wanted = settings.get(f"{name}_token_id"), ids.get(token) if token is not None else None
        if token is not None and wanted is None:
            yield VOCABULARY, f"does not hold the {name} token {token!r}"
        elif wanted is not None and stated is not None and wanted not in _many(stated):
            yield "generation_config.json", f"{name}_token_id is {stated}, the tokenizer's {token!r} is {wanted}"


def _query_problems(ids: Mapping[str, int], config: dict) -> Iterator[tuple[str, str]]:
    """The question's tokens are rows of the fusion table in front of the queries' own."""
    first, largest = config.get("first_query_token_id"), max(ids.values(), default=-1)
    if isinstance(first, int) and largest > first:
        yield "config.json", f"first_query_token_id is {first}, but the query tokenizer's ids go up to {largest}"


def vocabulary(path: Path) -> dict[str, int]:
    """{token: id} of a tokenizer.json, added tokens included; empty when it is none."""
    document = json.loads(path.read_text(encoding="utf-8"))
    model = document.get("model") if isinstance(document, dict) else None
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # unigram: [token, score] in the order of ids
        found = {entry[0]: number for number, entry in enumerate(found) if isinstance(entry, list) and entry}
    ids = {token: number for token, number in (found or {}).items() if isinstance(number, int)}
    added = document.get("added_tokens") if isinstance(document, dict) else None
    rows = [row for row in added or () if isinstance(row, dict) and isinstance(row.get("id"), int)]
    return ids | {row["content"]: row["id"] for row in rows if isinstance(row.get("content"), str)}


def _read(files: Mapping[str, Path], name: str) -> dict:
    data = json.loads(files[name].read_text(encoding="utf-8")) if name in files else {}
    return data if isinstance(data, dict) else {}


def _token(value: Any) -> str | None:
    """A token as tokenizer_config.json may spell it: text, or a mapping with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _many(value: Any) -> list:
    return value if isinstance(value, list) else [value]

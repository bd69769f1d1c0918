"""What the Hub would refuse, or readers stumble over, in a card; without a network.

Covers what the Hub's own validation is known to ask, and what it lets pass silently: misspelt keys, tables out of
shape, links to files that are not there, code that does not compile.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard

from fusedvlm.hub_cards.licenses import LICENSES, terms_of
from fusedvlm.model_source import HUB_ID

from .card_links import link_problems

KEYS = {
    "language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model",
    "base_model_relation", "datasets", "metrics", "tags", "model-index", "new_version", "thumbnail", "co2_eq_emissions",
    "widget", "inference",
}  # fmt: skip
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
LEFT_OVER = re.compile(r"\[?more information needed\]?|\{\{|\{%|/(?:home|Users)/\w|/(?:tmp|root)/", re.IGNORECASE)


def lint_card(text: str, sizes: Mapping[str, int], repo_id: str | None) -> list[str]:
    """What is wrong with a card, one line each; empty when nothing is.

    Args:
        text: README.md.
        sizes: {path in the repository: bytes} of all files beside it.
        repo_id: the repository it is for; None leaves that open.
    """
    try:
        card = ModelCard(text)
        metadata = card.data.to_dict()
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        return [f"the metadata block cannot be read: {str(error).splitlines()[0]}"]
    body = text.split("\n---\n", 1)[-1]
    bare = FENCE.sub("", body)
    return [
        *([] if str(card) == text else ["the metadata block changes when it is read and written again"]),
        *_metadata(metadata),
        *_model_index(metadata.get("model-index")),
        *_license_files(metadata, sizes),
        *link_problems(body, sizes),
        *_tables(bare),
        *(f"left over: {match.group()!r}" for match in LEFT_OVER.finditer(bare)),
        *_code(body, repo_id),
    ]


def _metadata(data: dict[str, Any]) -> Iterator[str]:
    """Keys and their values."""
    for key in sorted(set(data) - KEYS):
        yield f"metadata: {key!r} is not a key of the Hub's (misspelt?)"
    if not isinstance(data.get("license"), str) or data["license"] not in LICENSES:
        yield f"metadata: license {data.get('license')!r} is not one of the Hub's; use other with license_name"
    if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
        yield "metadata: license other needs license_name and license_link"
    if data.get("pipeline_tag") != "image-text-to-text":
        yield f"metadata: pipeline_tag is {data.get('pipeline_tag')!r}, not image-text-to-text"
    if data.get("library_name") != "transformers":
        yield f"metadata: library_name is {data.get('library_name')!r}, not transformers"
    if data.get("base_model") and data.get("base_model_relation") not in RELATIONS:
        yield f"metadata: base_model_relation {data.get('base_model_relation')!r} is none of {sorted(RELATIONS)}"
    for key, pattern in (("base_model", MODEL_ID), ("datasets", HUB_ID), ("language", LANGUAGE)):
        for value in _many(data.get(key)):
            if not isinstance(value, str) or not pattern.fullmatch(value):
                yield f"metadata: {key} {value!r} is not valid"


def _many(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _model_index(index: Any) -> Iterator[str]:
    """Fields that every result must have."""
    try:
        for result in [result for model in index or () for result in model["results"]]:
            wanted = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            wanted = [(part, key) for part, key in wanted if not result[part].get(key)]
            for part, key in wanted:
                yield f"metadata: a result of model-index has no {part}.{key}"
            for metric in result["metrics"]:
                value = metric.get("value")
                if not metric.get("type") or isinstance(value, bool) or not isinstance(value, (int, float)):
                    yield f"metadata: model-index has the value {value!r}"
                elif not abs(value) < float("inf"):
                    yield f"metadata: model-index has the value {value}, which is no number"
    except (KeyError, TypeError, AttributeError) as error:
        yield f"metadata: model-index is malformed ({error!r})"


def _license_files(data: dict[str, Any], sizes: Mapping[str, int]) -> Iterator[str]:
    terms = terms_of(data.get("license"))
    for name in ("LICENSE", "NOTICE"):
        if terms is not None and name not in sizes:
            yield f"the {terms.title} asks for a {name} file"


def _tables(text: str) -> Iterator[str]:
    """All rows of a table have as many cells as its header."""
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        counts = {line.strip().strip("|").count("|") for line in block.splitlines()}
        if len(counts) > 1:
            yield f"the table {block.splitlines()[0]!r} has rows of different length"


def _code(text: str, repo_id: str | None) -> Iterator[str]:
    """Python blocks compile, and speak of this repository."""
    for _, language, source in FENCE.findall(text):
        if language != "python":
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            yield f"a Python block does not compile: {error.msg} in {(error.text or '').strip()!r}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and repo_id and ast.unparse(node.targets[0]) == "(repo, revision)":
                named = ast.unparse(node.value.elts[0]) if isinstance(node.value, ast.Tuple) else "?"
                if named.strip("'\"") != repo_id:
                    yield f"a Python block loads {named}, this is {repo_id}"

"""Everything in a repository's JSON files that makes transformers or peft load code, resolved without loading it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusedvlm.hub_cards.release.bundle import auto_maps

CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
ELSEWHERE = re.compile(r"[\w.-]+(/[\w.-]+)?--[\w.]+", re.ASCII)  # transformers' spelling of another repository's class
OUTSIDE = re.compile(r"(^|[/\\])\.\.([/\\]|$)")
# Keys whose values name code, and those that transformers reads as the name of a class of its own.
CODE_KEYS = {"custom_pipelines", "custom_generate"}
CLASS_KEYS = {
    "tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type",
}  # fmt: skip
# Keys that may name another repository; every other `..._name_or_path` would fetch something no variant needs.
REPOSITORY_KEYS = {
    "text_model_name_or_path", "vision_model_name_or_path", "base_model_name_or_path", "_name_or_path", "name_or_path",
}  # fmt: skip


def reference_problems(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of every reference to code in these JSON files.

    Args:
        files: {path in the repository: file}, JSON files and code; the code must parse.
    """
    code = [path for name, path in files.items() if name.endswith(".py") and "/" not in name]
    registered = {reference for places in auto_maps(code).values() for reference in places}
    for name, path in files.items():
        if name.endswith(".json"):
            document = json.loads(path.read_text(encoding="utf-8"))
            yield from ((name, what) for what in dict.fromkeys(_problems(document, registered)))


def _problems(document: Any, registered: set[str]) -> Iterator[str]:
    for key, value in entries(document):
        if key == "auto_map":
            named = value.items() if isinstance(value, dict) else [("a class", value)]
            wrong = ((auto, what) for auto, places in named for what in _class_problems(places, registered))
            yield from (f"auto_map gives {auto} as {what}" for auto, what in wrong)
        elif key in CODE_KEYS and value:
            yield f"{key} asks for code that is none of this package's"
        elif str(key).endswith(("attn_implementation", "experts_implementation")):
            kernels = [place for place in leaves(value) if isinstance(place, str) and "/" in place]
            yield from (f"{key} asks for the code of {kernel}" for kernel in kernels)
        elif key in CLASS_KEYS and value is not None and not (isinstance(value, str) and NAME.fullmatch(value)):
            yield f"{key} is {value!r}, which is no name of a class"
        elif str(key).endswith("name_or_path") and key not in REPOSITORY_KEYS and value:
            yield f"{key} names {value!r}, which no variant needs"
        elif key != "auto_map" and isinstance(value, str):
            yield from _string_problems(value)


def _class_problems(places: Any, registered: set[str]) -> Iterator[str]:
    """What is wrong with the entries of an auto_map for one Auto class; null is fine, transformers skips it."""
    for place in leaves(places):
        if place is None or place in registered:
            continue
        if isinstance(place, str) and "--" in place:
            yield f"{place!r}, code in another repository"
        elif isinstance(place, str) and CLASS.fullmatch(place):
            yield f"{place!r}, which is not in the repository or the code there does not register"
        else:
            yield f"{place!r}, which is no class"


def _string_problems(value: str) -> Iterator[str]:
    if ELSEWHERE.fullmatch(value) and "." in value.rpartition("--")[2]:
        yield f"refers to code in another repository, {value!r}"
    if len(value) < 4096 and OUTSIDE.search(value) and not any(character.isspace() for character in value):
        yield f"points out of the repository, {value!r}"


def entries(document: Any) -> Iterator[tuple[str | int, Any]]:
    """(key, value) of everything in nested data, without recursion: files from elsewhere may be nested deeply."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in pairs:
            yield key, entry
            if isinstance(entry, dict | list):
                waiting.append(entry)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested data that is neither a list nor a mapping."""
    if isinstance(value, dict | list):
        yield from (entry for _, entry in entries(value) if not isinstance(entry, dict | list))
    else:
        yield value

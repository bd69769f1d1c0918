"""Plain data (JSON, YAML) to dataclasses, strictly: files of facts come from other machines, and may be damaged."""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")
# What a value should have been, by the type of pydantic's error.
EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "mapping_type": "keys and values",
    "dataclass_type": "keys and values",
    "dataclass_exact_type": "keys and values",
}

UNION_OPTIONS = ("str", "list[str]")


def build(kind: type[T], value: Any, where: str) -> T:
    """A `kind` from plain data; only lists become tuples, and whole numbers floats.

    Args:
        kind: a dataclass, or any type made of dataclasses, text, numbers, truth values, lists and mappings.
        value: what JSON or YAML gave.
        where: named in errors.

    Raises:
        ValueError: naming the place, for unknown or missing keys, wrong types, numbers that are not finite, and for
            what the dataclass itself refuses.
    """
    try:
        text = json.dumps({"value": value})
    except TypeError as error:
        raise ValueError(f"{where} holds what JSON cannot: {error}; write it in quotes.") from None
    try:
        return _adapter(kind).validate_json(text).value  # type: ignore[arg-type]  # a type can be hashed
    except ValidationError as error:
        # A misspelt key is also a missing one: it is the mistake.
        errors = sorted(error.errors(), key=lambda entry: entry["type"] != "unexpected_keyword_argument")
        raise ValueError(_explain(errors[0], kind, where)) from None


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter:
    # The strictness of the outermost dataclass holds for all inside it.
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return TypeAdapter(make_dataclass("Holder", [("value", kind)], namespace={"__pydantic_config__": strict}))


def _explain(error: ErrorDetails, kind: Any, where: str) -> str:
    """One line that names the place inside the data."""
    # Of a union pydantic names the option it tried, which is no place in the data.
    location = tuple(part for part in error["loc"][1:] if part not in UNION_OPTIONS)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "unexpected_keyword_argument":
        known = ", ".join(sorted(entry.name for entry in fields(_kind_at(kind, location[:-1]))))
        return f"{_place(where, location[:-1])}: unknown key {location[-1]!r}; the keys are {known}."
    if error["type"] in ("missing", "missing_argument"):
        return f"{_place(where, location[:-1])}: {location[-1]} is missing."
    if error["type"] == "finite_number":
        return f"{_place(where, location)} is {error['input']}, which is no number."
    wanted = EXPECTED.get(error["type"])
    problem = (error["msg"][0].lower() + error["msg"][1:]).replace("input should be", "must be")
    if wanted:
        problem = f"must {'hold' if wanted == 'keys and values' else 'be'} {wanted}"
    return f"{_place(where, location)} {problem}, not {str(error['input'])!r:.80}."


def _place(where: str, location: Sequence[int | str]) -> str:
    parts = "".join(f"[{part}]" if isinstance(part, int) else f": {part}" for part in location)
    return where + parts


def _kind_at(kind: Any, location: Sequence[int | str]) -> Any:
    """The type at a place inside a type."""
    for part in location:
        kind = _without_none(kind)
        if is_dataclass(kind):
            kind = typing.get_type_hints(kind)[str(part)]
        else:
            inner = typing.get_args(kind)
            kind = inner[1] if typing.get_origin(kind) in (dict, Mapping) else inner[0]
    return _without_none(kind)


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(option for option in typing.get_args(kind) if option is not types.NoneType)
    return kind

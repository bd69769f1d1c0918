"""Plain data to dataclasses, with every type checked: files of facts come from other machines, and may be damaged."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def build(kind: type[T], value: Any, where: str) -> T:
    """A `kind` from plain data.

    Args:
        kind: a dataclass, str, int, float, bool, Any, `X | None`, `tuple[X, ...]`, `list[X]` or a mapping of these.
        value: what JSON or YAML gave.
        where: named in errors.

    Raises:
        ValueError: naming the place, for unknown or missing keys, wrong types and numbers that are not finite.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        (other,) = (option for option in inner if option is not types.NoneType)
        return None if value is None else build(other, value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {value!r}.")
        return origin(build(inner[0], entry, f"{where}[{number}]") for number, entry in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where} must hold keys and values, not {value!r}.")
        return {key: build(inner[1], entry, f"{where}.{key}") for key, entry in value.items()}
    return _scalar(kind, value, where)


def _dataclass(kind: type[T], value: Any, where: str) -> T:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must hold keys and values, not {value!r}.")
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := sorted(map(str, set(value) - set(known))):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}.")
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{where}: {name} is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: build(hints[name], entry, f"{where}: {name}") for name, entry in value.items()})


def _scalar(kind: type[T], value: Any, where: str) -> T:
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"{where} must be {names[kind]}, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which is no number.")
    return value

"""Strangers' values in messages: one line, never long."""

from collections.abc import Iterable
from typing import Any

LONGEST_MESSAGE = 300  # characters


def shown(value: Any, limit: int = 60) -> str:
    """A value as a message shows it: its type where it is long or no plain value."""
    is_plain = isinstance(value, (str, int, float, bool, type(None), list, dict))
    text = repr(value) if is_plain else type(value).__name__
    return text if len(text) <= limit else f"{text[:limit]}... ({type(value).__name__})"


def fit(message: object, limit: int = LONGEST_MESSAGE) -> str:
    """A message on one line of at most so many characters; what is cut off is at its end.

    >>> fit("no such\\n file", 12), fit("abcdefgh", 6)
    ('no such file', 'abc...')
    """
    text = " ".join(str(message).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def end_of(path: object, limit: int = 80) -> str:
    """A path whose beginning is left out where it is long: the file's own name is at its end.

    >>> end_of("/data/a/b/c.json", 12)
    '...b/c.json'
    """
    text = str(path)
    return text if len(text) <= limit else "..." + text[3 - limit :]


def name_counts(counts: Iterable[int]) -> str:
    """Counts as text, with every run of three or more as its ends: `1 to 32`, or `1, 2, 4, 8`.

    The models have a function of the same name and result, for code on the Hub cannot import this one.
    """
    runs: list[list[int]] = []
    for count in sorted(set(counts)):
        if runs and count == runs[-1][-1] + 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    parts = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(part for names in parts for part in names)

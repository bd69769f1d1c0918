"""What every command shares: JSON on standard output, everything else on standard error, exit codes."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def say(message: str) -> None:
    """Print one message for the person at the terminal (standard error, so `--json` output stays clean)."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def useful_line(error: BaseException) -> str:
    """The line of an error that says what is wrong, of one that a data-loader worker passed on too.

    >>> useful_line(ValueError("Row 3 is empty.\\nDetails follow."))
    'Row 3 is empty.'
    """
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}."
    text = str(error).strip()
    _, marker, traceback = text.partition("Original Traceback (most recent call last):")
    if marker:
        # Frames are indented; what was raised is not, and comes after the last of them.
        lines = traceback.splitlines()
        last = max((number for number, line in enumerate(lines) if line.startswith("  File ")), default=0)
        raised = [line for line in lines[last:] if line[:1] not in ("", " ")]
        text = raised[0] if raised else text
        kind, colon, message = text.partition(": ")
        text = message if colon and kind.replace(".", "").replace("_", "").isalnum() else text
    return text.splitlines()[0] if text else type(error).__name__


def show(text: str) -> None:
    """Print a result on standard output."""
    sys.stdout.write(text + "\n")


def emit_json(document: Any) -> None:
    """Print one JSON document on standard output; NaN and infinity are refused because JSON has no such numbers."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def progress(iterable: Iterable | None = None, description: str = "", total: int | None = None, **kwargs: Any) -> tqdm:
    """Progress bar on standard error."""
    return tqdm(iterable, desc=description, total=total, file=sys.stderr, dynamic_ncols=True, **kwargs)

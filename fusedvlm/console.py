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


def show(text: str) -> None:
    """Print a result on standard output."""
    sys.stdout.write(text + "\n")


def emit_json(document: Any) -> None:
    """Print one JSON document on standard output; NaN and infinity are refused because JSON has no such numbers."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def progress(iterable: Iterable | None = None, description: str = "", total: int | None = None, **kwargs) -> tqdm:
    """Progress bar on standard error."""
    return tqdm(iterable, desc=description, total=total, file=sys.stderr, dynamic_ncols=True, **kwargs)

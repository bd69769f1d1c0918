"""Which files a path or pattern names; light enough to be asked before anything else is imported."""

import glob
import os
import re
from typing import Any

JSON_ENDINGS = re.compile(r"\.jsonl?(\.(gz|bz2|xz|zip))?$|\.zip$")


def find_files(path: str | list[str]) -> list[str]:
    """Files of a path, a list of paths or patterns such as `shards/*.tar`, sorted within each; URLs pass.

    Raises:
        ValueError: naming what does not exist.
    """
    found: list[str] = []
    for pattern in [path] if isinstance(path, str) else path:
        pattern = os.path.expanduser(str(pattern))
        matches = [pattern] if "://" in pattern or os.path.isfile(pattern) else sorted(glob.glob(pattern))
        matches = [match for match in matches if "://" in match or os.path.isfile(match)]
        if not matches:
            raise ValueError(
                f"{pattern}: no such file; give a file, a list of files or a pattern such as 'data/*.json'."
            )
        found.extend(matches)
    return found


def require_files(kind: Any, path: Any) -> None:
    """Raise `ValueError` for a source whose files are not there; datasets of the Hub are for their reader."""
    if not (isinstance(kind, str) and isinstance(path, str) and path):
        return
    if kind not in ("chat", "parquet") or (kind == "chat" and JSON_ENDINGS.search(path)):
        find_files(path)

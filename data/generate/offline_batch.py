"""Requests and answers as files: OpenAI's Batch format, which `vllm run-batch` reads and writes too.

{"custom_id": KEY, "method": "POST", "url": "/v1/chat/completions", "body": {...}}                       what is asked
{"custom_id": KEY, "response": {"status_code": 200, "body": {...}}, "error": null}                       what comes back
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fusedvlm.console import progress
from fusedvlm.data.sample_files import open_output
from fusedvlm.data.sources.find_files import find_files

from .journal import Journal
from .llm_client import Declined, Messages, text_of_answer

MOST_REQUESTS = 50_000  # per file, and
MOST_BYTES = 190_000_000  # as OpenAI takes them (200 MB)
URL = "/v1/chat/completions"
PASSING = (408, 409, 425, 429)


def write_batches(
    requests: Iterable[tuple[str, Messages]],
    folder: str | Path,
    body: Callable[[Messages], dict[str, Any]],
    journal: Journal,
    total: int | None = None,
) -> dict[str, int]:
    """Write what the journal has no answer to as `requests-00000.jsonl`, `requests-00001.jsonl`, ...

    Args:
        requests: key and conversation of each, made one by one.
        folder: made; must hold no requests yet.
        body: conversation to the body of a request.
        journal: keys in it are left out.
        total: of the progress bar.

    Returns:
        `{"requests", "files"}`.

    Raises:
        ValueError: for a folder that holds requests.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("requests-*.jsonl")):
        raise ValueError(f"{folder} holds requests already; choose another folder or remove them.")
    lines = _lines(progress(requests, "Writing requests", total), body, journal)
    written = files = 0
    pending = next(lines, None)
    while pending is not None:
        with open_output(folder / f"requests-{files:05d}.jsonl") as file:
            count = size = 0
            while pending is not None and count < MOST_REQUESTS and (not count or size + len(pending) <= MOST_BYTES):
                file.write(pending)
                count, size = count + 1, size + len(pending)
                pending = next(lines, None)
        written, files = written + count, files + 1
    return {"requests": written, "files": files}


def _lines(requests: Iterable[tuple[str, Messages]], body: Callable, journal: Journal) -> Iterator[str]:
    # ASCII only, so that characters are bytes. The keys are noted on the disk: each is asked once.
    for key, messages in requests:
        if key in journal or journal.is_expected(key):
            continue
        journal.expect([key])
        yield json.dumps({"custom_id": key, "method": "POST", "url": URL, "body": body(messages)}) + "\n"


def read_batches(
    paths: str | list[str],
    keys: Iterable[str],
    journal: Journal,
    entry_of: Callable[[str], dict[str, Any]],
) -> dict[str, int]:
    """Take answers from files into the journal.

    Args:
        paths: files, or patterns.
        keys: of all requests of this work.
        journal: open; gets answers, refusals and cut replies. Requests that expired or failed for a passing reason stay
            open, for another batch.
        entry_of: text of an answer to its entry.

    Returns:
        How many lines were "answered", "refused", "cut", "unanswered" and "foreign" (of other work).

    Raises:
        ValueError: naming the file and line that is no answer; when none of the answers belongs to this work.
    """
    journal.expect(keys)
    counts: Counter = Counter()
    for path in find_files(paths):
        journal.add_many(_entries(path, journal, entry_of, counts))
    if counts["foreign"] and not counts.total() - counts["foreign"]:
        raise ValueError(
            f"None of {counts['foreign']} answers belongs to these requests: give the same data, --model, "
            "--temperature, --seed and --max-tokens with which the requests were written."
        )
    return {name: counts[name] for name in ("answered", "refused", "cut", "unanswered", "foreign")}


def _entries(path: str, journal: Journal, entry_of: Callable, counts: Counter) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(progress(file, f"Reading {Path(path).name}"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = row["custom_id"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not an answer of a batch (JSON with custom_id).") from None
            if not journal.is_expected(str(key)):
                counts["foreign"] += 1
                continue
            entry = _entry(str(key), row, entry_of, counts)
            if entry is not None:
                yield entry


def _entry(key: str, row: dict[str, Any], entry_of: Callable, counts: Counter) -> dict[str, Any] | None:
    """Journal entry of one line; None when the request stays open."""
    response = row.get("response") or {}
    code, body = response.get("status_code"), response.get("body")
    try:
        if code == 200 and isinstance(body, dict):
            entry = {"key": key, "kind": "answer", **entry_of(text_of_answer(body))}
            counts["answered"] += 1
            return entry
        if isinstance(code, int) and 400 <= code < 500 and code not in PASSING:
            raise Declined("refused", f"HTTP {code} {str(body)[:300]}")
    except Declined as error:
        counts[error.kind] += 1
        return {"key": key, "kind": error.kind, "detail": str(error)}
    except ValueError:
        pass  # an answer that is none: asked again
    counts["unanswered"] += 1
    return None

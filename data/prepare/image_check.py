"""Look at every image of a training set before training: which are missing, which cannot be opened, and why."""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from fusedvlm.console import progress
from fusedvlm.data.sample_files import as_json, open_output
from fusedvlm.data.sources.converters import Sample
from fusedvlm.data.sources.source_spec import RowSource, RowStream
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image

from .row_check import RowChecker, RowReport

SHOWN = 10
BLOCK = 512  # samples whose images are looked at together
MISSING = "no such file"
REMOTE = ("http://", "https://")
COUNTS = ("samples", "images", "missing", "corrupt", "affected", "not_fetched", "unusable")


@dataclass
class ImageReport:
    """What `check_images` found.

    `missing` and `corrupt` hold one entry per image: its name, the reason, its source and how many samples show it.
    `by_source` holds per source the samples, images, missing, corrupt, samples with a bad image, and images that were
    not looked at because they are URLs.
    """

    samples: int = 0
    images: int = 0
    missing: list[dict[str, Any]] = field(default_factory=list)
    corrupt: list[dict[str, Any]] = field(default_factory=list)
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    rows: RowReport = field(default_factory=RowReport)

    @property
    def bad(self) -> list[dict[str, Any]]:
        """All entries."""
        return [*self.missing, *self.corrupt]

    @property
    def affected(self) -> int:
        """Samples that show a bad image."""
        return sum(counts["affected"] for counts in self.by_source.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "rows"}
        return {**own, "rows": self.rows.as_dict()}

    def require_good(self) -> None:
        """Raise when an image is bad, or a row cannot be trained on.

        Raises:
            ValueError: with the counts and the first names.
        """
        problems = []
        if self.bad:
            shown = "; ".join(f"{entry['image']} ({entry['reason']})" for entry in self.bad[:SHOWN])
            more = f"; and {len(self.bad) - SHOWN} more" if len(self.bad) > SHOWN else ""
            problems.append(
                f"{len(self.missing)} images are missing and {len(self.corrupt)} cannot be opened, of {self.images}: "
                f"{shown}{more}. Restore them, or drop their {self.affected} samples with --drop OUT.jsonl."
            )
        if reasons := self.rows.reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            first = next(iter(self.rows.first.values()))[0]
            problems.append(
                f"{reasons.total()} of {self.rows.rows} rows cannot be trained on ({counts}), e.g. {first[:100]}. "
                "Correct them, or drop them with --drop OUT.jsonl; training skips them up to max_skipped_rows."
            )
        if problems:
            raise ValueError(" ".join(problems))


def check_images(
    sources: Iterable[RowSource | RowStream],
    workers: int | None = None,
    drop_to: str | Path | None = None,
    show_progress: bool = True,
    checker: RowChecker | None = None,
) -> ImageReport:
    """Open every image of every sample once, to its last pixel, and look at the conversations.

    Args:
        sources: of `load_source`.
        workers: threads; by default one per CPU.
        drop_to: write the samples whose images are all good to this JSON Lines file, which then is a `chat` source. It
            appears when it is complete.
        show_progress: a bar on standard error.
        checker: tells which rows can be trained on; by default what can be told without a tokenizer.

    Returns:
        The report; call its `require_good()` to stop on bad images and rows.
    """
    checker = checker or RowChecker(None)
    report = ImageReport(rows=RowReport("words" if checker.processor is None else "tokens"))
    reasons: dict[str, str | None] = {}  # image to why it is bad, or None: many samples show the same image
    entries: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool, open_output(drop_to) as out:
        for source in sources:
            label = source.spec.label
            counts = report.by_source.setdefault(label, dict.fromkeys(COUNTS, 0))
            total = len(source) if isinstance(source, RowSource) else None
            for sample, names in progress(look(source, pool, reasons, counts), label, total, disable=not show_progress):
                bad = [name for name in names if reasons[name] is not None]
                for name in bad:
                    entry = {"image": name, "reason": reasons[name], "source": label, "samples": 0}
                    entries.setdefault(name, entry)["samples"] += 1
                counts["samples"] += 1
                counts["affected"] += bool(bad)
                is_good = report.rows.add(checker, sample, open_images=False) and not bad
                counts["unusable"] += not is_good
                if out is not None and is_good:
                    out.write(json.dumps(as_json(sample), ensure_ascii=False) + "\n")
    report.samples = sum(counts["samples"] for counts in report.by_source.values())
    report.images = sum(counts["images"] for counts in report.by_source.values())
    for entry in entries.values():
        (report.missing if entry["reason"] == MISSING else report.corrupt).append(entry)
    return report


def look(
    source: Iterable[Sample], pool: ThreadPoolExecutor, reasons: dict[str, str | None], counts: dict[str, int]
) -> Iterator[tuple[Sample, list[str]]]:
    """Samples with the names of their images, after looking at those that `reasons` does not know yet."""
    rows = iter(source)
    while block := list(islice(rows, BLOCK)):
        named = [(sample, name_images(sample)) for sample in block]
        new = {name: image for _, images in named for name, image in images.items() if name not in reasons}
        for name, reason in zip(new, pool.map(why_bad, new.values()), strict=True):
            reasons[name] = reason
            counts["images"] += 1
            if reason is not None:
                counts["missing" if reason == MISSING else "corrupt"] += 1
            counts["not_fetched"] += name.startswith(REMOTE)
        yield from ((sample, list(images)) for sample, images in named)


def name_images(sample: Sample) -> dict[str, Any]:
    """A sample's images by name: paths are their own, embedded ones are called after the sample."""
    return {
        image if isinstance(image, str) else f"image {number} of {sample['source']} {sample['id']}": image
        for number, image in enumerate(sample["images"])
    }


def why_bad(image: Any) -> str | None:
    """Why an image cannot be used, or None. Images on the web are not fetched."""
    if isinstance(image, str) and image.startswith(REMOTE):
        return None
    if isinstance(image, str) and not image.startswith("data:") and not os.path.exists(image):
        return MISSING
    try:
        load_image(image)
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{image}: ") if isinstance(image, str) else str(error)
    return None

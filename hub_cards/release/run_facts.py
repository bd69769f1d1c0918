"""Where facts are read: a variant's own files, the result files beside it."""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from fusedvlm.costs.variant_info import Backbone, describe_config
from fusedvlm.evaluation.results import EvaluationResults
from fusedvlm.files import parse_json, read_json, sha256_of
from fusedvlm.hub_cards.card.card_tables import AFTER, BEFORE
from fusedvlm.hub_cards.facts import Answer, CountedFacts, Example, StatedFacts
from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.plain_data import build

from .bundle import VARIANT_PATTERNS, Content, Files, is_local, self_contained

RESULTS, CONTROL, RUN = "results.json", "swapped.json", "run.json"
EXAMPLE, PICTURE = "example.json", "example.png"
RUN_KEYS = ("stage", "command", "started", "finished", "processes", "versions")
ABSOLUTE = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[\w.+@~-]+[/\\])+([\w.+@~-]*)")


def read_content(content: Content) -> bytes:
    """Bytes of a file in a repository."""
    return content if isinstance(content, bytes) else Path(content).read_bytes()


def content_hash(content: Content) -> str:
    """sha256 in hex; files are read once as long as they stay the same."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    status = Path(content).stat()
    return _path_hash(str(Path(content).resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _path_hash(path: str, size: int, changed: int) -> str:
    return sha256_of(path)


def content_size(content: Content) -> int:
    """Size in bytes."""
    return len(content) if isinstance(content, bytes) else Path(content).stat().st_size


def count_facts(folder: Path, files: Files, stated: StatedFacts) -> CountedFacts:
    """Facts that follow from a variant's files.

    Args:
        folder: the variant.
        files: its files as they are published. Configuration and weights are counted; of all that decides how it
            answers, and of the license texts, the hash is kept.
        stated: licenses of the backbones.

    Raises:
        ValueError: when the configuration is not one of a FusedVLM variant.
    """
    config = read_config(folder, files["config.json"])
    with building_a_model(folder):
        described = describe_config(FusedVLMConfig.from_dict(config))
    for tower, license in (("vision", stated.vision_license), ("language_model", stated.llm_license)):
        described[tower] = _published(described[tower], license)
    weights = {name: content for name, content in files.items() if name.endswith(".safetensors")}
    return CountedFacts(
        **described,
        self_contained=self_contained(folder),
        weight_bytes=sum(content_size(content) for content in weights.values()),
        sha256={name: content_hash(files[name]) for name in sorted(files) if is_decisive(name, stated)},
    )


def _published(backbone: Backbone, license: str | None) -> Backbone:
    """The tower as readers of a card know it: a folder of the publisher's machine is no source."""
    if is_local(backbone.repo) or not backbone.repo:
        return Backbone(backbone.type, None, None, license)
    return replace(backbone, license=license)


def is_decisive(name: str, stated: StatedFacts) -> bool:
    """Whether a file decides how a variant answers, or is one of its license texts."""
    patterns = (*VARIANT_PATTERNS, "*.py")
    return name in stated.license_files or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def read_config(folder: Path, content: Content) -> dict:
    """The configuration of a variant. Raises `ValueError` when it is not one."""
    config = parse_json(read_content(content), f"{folder}/config.json")
    if not isinstance(config, dict) or config.get("model_type") != "fusedvlm":
        raise ValueError(f"{folder}: not a FusedVLM variant (config.json has another model_type).")
    return config


@contextmanager
def building_a_model(folder: Path) -> Iterator[None]:
    """Turn whatever transformers and torch raise for a nonsense configuration into one `ValueError`."""
    try:
        yield
    except (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError, ImportError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder}/config.json: describes no model ({reason}).") from error


def read_results(variant: Path, name: str) -> EvaluationResults | None:
    """Results of the family, None when nothing was measured. Folders of this machine are left out of the command.

    Raises:
        ValueError: for a damaged file, numbers that are not finite, or two scores of one task at one m.
    """
    # The family's file wins: a copy inside may be what an earlier card left there, before the last evaluation.
    if (path := _first(variant.parent / name, variant / name)) is None:
        return None
    results = build(EvaluationResults, read_json(path), str(path))
    seen = set()
    for row in results.scores:
        if row.key in seen:
            raise ValueError(f"{path}: {row.label!r} has two scores at m={row.num_visual_tokens}; which one is right?")
        seen.add(row.key)
    _check_tasks({row.label for row in results.scores}, path)
    for latency in results.latencies:
        if min(latency.time_to_first_token, latency.seconds_per_answer) <= 0:
            raise ValueError(
                f"{path}: the latency at m={latency.num_visual_tokens} is not a positive number of seconds."
            )
    environment = results.environment
    sources = {
        name: source
        if source.environment is None
        else replace(
            source,
            environment=replace(source.environment, command=without_folders(source.environment.command)),
        )
        for name, source in results.sources.items()
    }
    shown = replace(environment, command=without_folders(environment.command))
    return replace(results, environment=shown, sources=sources)


def _check_tasks(tasks: set[str], path: Path) -> None:
    """Task names become columns of a table, so each must be a line of its own."""
    names = [" ".join(task.split()) for task in sorted(tasks)]
    for name in names:
        if not name or name in (*BEFORE, *AFTER) or names.count(name) > 1:
            raise ValueError(f"{path}: {name!r} cannot be the name of a task, the card has such a column; rename it.")


def read_example(variant: Path) -> tuple[Example, Path] | None:
    """The family's example and its picture: `example.json` (image, question, answers by m, expected) in or beside it.

    Raises:
        ValueError: for a damaged file, a picture that is missing or none, or answers at fewer than two m.
    """
    if (path := _first(variant.parent / EXAMPLE, variant / EXAMPLE)) is None:
        return None
    try:
        document = read_json(path)
        answers = tuple(Answer(int(m), str(text)) for m, text in document["answers"].items())
        picture = path.parent / Path(document["image"]).name
        question, expected = str(document["question"]), document.get("expected")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an example of answers ({error}).") from error
    if not picture.is_file() or not picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path}: its picture {picture.name} is missing or no PNG.")
    if len(answers) < 2:
        raise ValueError(f"{path}: has answers at {len(answers)} numbers of visual tokens; show two at least.")
    ordered = tuple(sorted(answers, key=lambda answer: answer.num_visual_tokens))
    return Example(content_hash(picture), question, ordered, None if expected is None else str(expected)), picture


def weights_digest(files: Files) -> str:
    """One digest of all weights: the file's own sha256, or that of the list of them when there are several."""
    hashes = {name: content_hash(content) for name, content in sorted(files.items()) if name.endswith(".safetensors")}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()).hexdigest()


def read_run(variant: Path) -> dict[str, Any] | None:
    """What the training run recorded, as far as it did, without folders of this machine; None without a record.

    Returns:
        `settings` (the resolved recipe), `stages` (what each stage reached), `data` (manifest), and any of `stage`,
        `command`, `started`, `finished`, `processes`, `versions`.
    """
    # Here the variant's own wins: members of a family may come from runs of their own.
    if (path := _first(variant / RUN, variant.parent / RUN)) is None:
        return None
    record = read_json(path)
    kept = {key: record[key] for key in RUN_KEYS if record.get(key) is not None}
    named = {"settings": record.get("settings") or record.get("recipe"), "stages": record.get("stages")}
    return _without_folders({**named, "data": record.get("data"), **kept})


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def without_folders(text: str) -> str:
    """Text with absolute paths cut to their last part."""
    return ABSOLUTE.sub(lambda match: ".../" + match.group(1), text)


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, dict):
        return {without_folders(key): _without_folders(entry) for key, entry in value.items()}
    return [_without_folders(entry) for entry in value] if isinstance(value, list) else value

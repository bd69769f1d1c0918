"""What a model card says, as typed facts.

*Stated* by a user, *measured* by a run of this package, or *counted* in files. A measured fact carries the command,
versions, hardware and date of its run. A counted fact (parameters, sizes, trained m) follows from a file alone, so it
carries that file's sha256 instead. What nobody stated or measured is `None` and is shown as missing.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fusedvlm.costs.variant_info import VariantDescription
from fusedvlm.evaluation.results import EvaluationResults
from fusedvlm.files import parse_json, read_yaml
from fusedvlm.model_source import HUB_ID
from fusedvlm.plain_data import build
from fusedvlm.wording import shown

COMMIT = re.compile(r"[0-9a-f]{40}")
COLLECTION = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}", re.ASCII)
FACTS_FILE = "facts.yaml"


@dataclass(frozen=True)
class Dataset:
    """Training data as stated: `id` is a Hub id, other sources have a web address or neither."""

    name: str
    license: str | None = None
    id: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if self.id is not None and not HUB_ID.fullmatch(self.id):
            raise ValueError(f"Dataset {self.name!r}: id {self.id!r} is not a Hub id like org/name; use url instead.")
        if self.url is not None and not self.url.startswith(("https://", "http://")):
            raise ValueError(f"Dataset {self.name!r}: url {self.url!r} must start with https:// or http://.")


@dataclass(frozen=True)
class Benchmark:
    """A task that is registered on the Hub as a benchmark: dataset id and the task id of its eval.yaml."""

    id: str
    task_id: str
    metric: str = "score"

    def __post_init__(self) -> None:
        # Both become part of a file's name.
        if not HUB_ID.fullmatch(self.id) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", self.task_id):
            raise ValueError(f"Benchmark {self.id!r}, task {self.task_id!r}: not a Hub id like org/name and a task id.")


@dataclass(frozen=True, kw_only=True)
class StatedFacts:
    """What only a user can say. `license` and `llm_license` have no default; None means that nobody stated one.

    Args:
        license: license of the variant's weights, as the Hub spells it ("llama2", "apache-2.0", "other", ...).
        llm_license: license of the language model inside or behind the variant.
        license_name, license_link: asked for by the Hub when the license is "other".
        vision_license: license of the vision tower's weights.
        languages: ISO 639-1 codes.
        datasets: what it was trained on, each with its license.
        benchmarks: task name of the results file -> registered benchmark.
        license_files: license texts that must travel along; the first one becomes LICENSE. Paths are relative to the
            file they are stated in; the facts of a card hold their names in the repository.
        collection: the family's, as OWNER/TITLE-ID; known after the first push, so later cards can link it.
        intended_use, out_of_scope, limitations, evaluation_notes, citation: prose.
    """

    license: str | None
    llm_license: str | None
    license_name: str | None = None
    license_link: str | None = None
    vision_license: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    license_files: tuple[str, ...] = ()
    collection: str | None = None
    intended_use: str | None = None
    out_of_scope: str | None = None
    limitations: str | None = None
    evaluation_notes: str | None = None
    citation: str | None = None

    def __post_init__(self) -> None:
        if self.collection is not None and not COLLECTION.fullmatch(self.collection):
            raise ValueError(
                f"collection {shown(self.collection)} must be OWNER/TITLE-ID, as its address ends that "
                "`fusedvlm push` prints."
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> "StatedFacts":
        """Read plain data, as from YAML.

        Raises:
            ValueError: for unknown keys (a misspelt license must not become a missing one) and wrong types.
        """
        data = {"license": None, "llm_license": None, **data}
        # An empty list in YAML is often written as nothing at all.
        lists = ("languages", "datasets", "benchmarks", "license_files")
        return build(cls, {key: value for key, value in data.items() if value is not None or key not in lists}, where)


@dataclass(frozen=True, kw_only=True)
class CountedFacts(VariantDescription):
    """What follows from the variant's own files: its configuration, and the files themselves.

    Args:
        self_contained: whether the language model's weights are in the repository.
        weight_bytes: size of the safetensors files.
        sha256: of each file that decides how it answers, and of the license texts.
    """

    self_contained: bool
    weight_bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Neighbor:
    """Another variant of the family."""

    num_visual_tokens: int
    repo_id: str


@dataclass(frozen=True)
class Common:
    """What the repositories of a family have in common.

    Args:
        weights: digest of the weights when all of them hold the same, None when they do not (or there is one only).
        dial: one repository with these weights for every m, beside those with one m each; None without one.
    """

    weights: str | None = None
    dial: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a variant answered at one number of visual tokens."""

    num_visual_tokens: int
    text: str


@dataclass(frozen=True)
class Example:
    """A picture, a question, and what the family really answered at several m.

    Args:
        sha256: of the picture, `example.png` in the repository.
        expected: the right answer, if there is one.
    """

    sha256: str
    question: str
    answers: tuple[Answer, ...]
    expected: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """Everything one card says.

    Args:
        repo_id, tag: the repository the card is for, and the release that its snippets pin.
        stated, counted: what the publisher says, and what follows from the configuration and the tensors.
        measured: the family's results, or None.
        control: the same questions with swapped images, or None.
        training: resolved settings of the run, or None.
        family: all variants in the order of m, this one included.
        package_version: version of this package that wrote the card.
        files: names of license, training and result files in the repository.
        common: what the family's repositories share.
        example: a picture with real answers, or None.
        complete: whether the repository is a release with checksums, as `fusedvlm push` makes it.
    """

    repo_id: str
    tag: str
    stated: StatedFacts
    counted: CountedFacts
    measured: EvaluationResults | None
    control: EvaluationResults | None
    training: Mapping[str, Any] | None
    family: tuple[Neighbor, ...]
    package_version: str
    files: tuple[str, ...] = ()
    common: Common = Common()
    example: Example | None = None
    complete: bool = True

    @property
    def is_dial(self) -> bool:
        """Whether this is the family's one repository for every m."""
        return self.common.dial == self.repo_id

    @property
    def m(self) -> int:
        """The variant's number of visual tokens."""
        return self.counted.num_visual_tokens

    def to_json(self) -> str:
        """All facts, at full precision."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CardFacts":
        """Read what `to_json` wrote. Raises `ValueError` when something is missing."""
        return build(cls, parse_json(text, "facts.json"), "facts.json")


def read_stated(path: Path) -> StatedFacts:
    """Read stated facts from YAML.

    Raises:
        ValueError: naming the file and what is wrong in it.
    """
    stated = StatedFacts.from_mapping(read_yaml(path), str(path))
    beside = Path(path).parent
    return replace(stated, license_files=tuple(str(beside / name) for name in stated.license_files))


def find_stated(variant: Path, given: Path | None = None, **overrides: Any) -> StatedFacts:
    """Stated facts from the file given, else facts.yaml in the variant or beside it; `overrides` win unless empty."""
    candidates = [given] if given else [variant / FACTS_FILE, variant.parent / FACTS_FILE]
    found = next((path for path in candidates if path and (given or path.exists())), None)
    stated = read_stated(found) if found else StatedFacts(license=None, llm_license=None)
    return replace(stated, **{name: value for name, value in overrides.items() if value})


def mean_scores(results: EvaluationResults | None) -> dict[int, float]:
    """Mean over tasks at each m that every task was measured at, each as a share of the most that can be reached.

    Over the tasks of the run that made the variants, where it measured any; else over those of `fusedvlm evaluate`, one
    metric each. Metrics without an upper bound have no share.
    """
    if results is None:
        return {}
    own = [row for row in results.scores if not row.harness]
    counted = [row for row in own or results.scores if row.is_primary and row.maximum is not None]
    by_m: dict[int, dict[str, float]] = {}
    for row in counted:
        by_m.setdefault(row.num_visual_tokens, {})[row.label] = row.score / (row.maximum or 1.0)
    tasks = {row.label for row in counted}
    return {m: sum(row.values()) / len(row) for m, row in sorted(by_m.items()) if set(row) == tasks}

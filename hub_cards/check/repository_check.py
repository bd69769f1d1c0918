"""Is a folder the complete and sound repository of a variant? Its code runs in isolated_loading.py only, and only when
everything here is in order."""

import ast
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

import fusedvlm
from fusedvlm.files import link_or_copy
from fusedvlm.hub_cards.card.lint_card import lint_card
from fusedvlm.hub_cards.card.readback import differences
from fusedvlm.hub_cards.card.render_card import render_card
from fusedvlm.hub_cards.facts import COMMIT, CardFacts, Neighbor
from fusedvlm.hub_cards.licenses import check_stated
from fusedvlm.hub_cards.release.adapter_release import AUTO_MAPPING
from fusedvlm.hub_cards.release.bundle import check_code, is_local, weight_headers
from fusedvlm.hub_cards.release.release_files import CARD, CHECKSUMS, FACTS, FOREIGN, evidence_files
from fusedvlm.hub_cards.release.run_facts import (
    CONTROL,
    PICTURE,
    RESULTS,
    content_hash,
    content_size,
    count_facts,
    weights_digest,
)
from fusedvlm.model_source import HUB_ID, require_folder

from .code_references import reference_problems
from .foreign_code import foreign_code, is_code, known_code, printable
from .isolated_loading import Loaded, load_isolated
from .leaks import looks_like_pickle, paths_in, secrets_in
from .license_evidence import license_problems
from .repository_files import VOCABULARIES, folder_files, misplaced, oversized
from .score_evidence import plot_problems, score_problems
from .token_ids import token_problems
from .weight_shapes import weight_problems
from .weight_values import value_problems

CHAT_TEMPLATES = ("chat_template.jinja", "query_tokenizer/chat_template.jinja")
REQUIRED = (
    CARD, FACTS, CHECKSUMS, "LICENSE-CODE", "config.json", "generation_config.json", "processor_config.json",
    "tokenizer_config.json", "chat_template.jinja", "query_tokenizer/tokenizer_config.json", "training/data.json",
)  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_REQUIRED = (CARD, CHECKSUMS, ADAPTER_CONFIG)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
AUTO_CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
    "processor_config.json": ("AutoProcessor",),
}
SUFFIXES = {".json", ".safetensors", ".py", ".md", ".txt", ".jinja", ".png", ".yaml", ".model"}
NAMES = {"LICENSE", "LICENSE-CODE", "NOTICE", ".gitattributes"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        file: path in the repository.
        message: what is wrong, one line.
        diff: for code that is none of this package's: what differs.
        foreign_code: whether this is about such code, which may be run on request.
    """

    file: str
    message: str
    diff: str = ""
    foreign_code: bool = False

    def __str__(self) -> str:
        return printable(" ".join(f"{self.file}: {self.message}".split()))


def check_files(files: Mapping[str, Path | bytes], repo_id: str | None = None) -> list[Problem]:
    """Problems of a repository's files, without loading the model; empty when all is well.

    Args:
        files: path in the repository -> file here, or bytes.
        repo_id: the repository they are for; None takes the one that the facts name.
    """
    with tempfile.TemporaryDirectory(prefix="fusedvlm-check-") as name:
        folder = Path(name)
        for path, content in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                link_or_copy(content, target)
        return check_contents(folder, repo_id)


def check_folder(path: Path, repo_id: str | None = None, load: bool = True) -> list[Problem]:
    """Problems of a folder: `check_and_load` without what came of loading."""
    return check_and_load(path, repo_id, load)[0]


def check_and_load(
    path: Path, repo_id: str | None = None, load: bool = True, run_foreign_code: bool = False
) -> tuple[list[Problem], Loaded | None]:
    """Problems of a folder, and what came of loading it where this package is not installed.

    It is loaded when its files are in order; an adapter is not, because its base lies elsewhere.

    Args:
        path: the folder.
        repo_id: the repository that it should be; None takes the one that its facts name.
        load: whether to load it at all.
        run_foreign_code: also load it when nothing is wrong but that its code is none of this package's.

    Raises:
        ValueError: when there is no such folder.
    """
    path = Path(path)
    require_folder(path)
    problems = check_static(path, repo_id)
    in_order = not problems or (run_foreign_code and all(problem.foreign_code for problem in problems))
    # CODEPATH: an adapter answers with its base only, which is checked as a repository of its own.
    if not load or not in_order or (path / ADAPTER_CONFIG).exists():
        return problems, None
    loaded = load_isolated(path)
    if loaded.problem is not None:
        problems.append(Problem("config.json", loaded.problem))
    return problems, loaded


def check_static(folder: Path, repo_id: str | None = None) -> list[Problem]:
    """Problems of a folder's files, without running anything of it."""
    wrong = [Problem(*found) for found in misplaced(folder)]
    return wrong or check_contents(folder, repo_id)


def check_contents(folder: Path, repo_id: str | None = None) -> list[Problem]:
    """Problems of what the files of a folder hold; links are followed wherever they lead."""
    files = folder_files(folder)
    is_adapter = ADAPTER_CONFIG in files and "config.json" not in files
    required = ADAPTER_REQUIRED if is_adapter else REQUIRED
    problems = [Problem(name, "missing") for name in required if name not in files]
    if not any(name.endswith(".safetensors") for name in files):
        problems.append(Problem(ADAPTER_WEIGHTS if is_adapter else "model.safetensors", "missing"))
    if ADAPTER_CONFIG in files and not is_adapter:
        problems.append(Problem(ADAPTER_CONFIG, "is an adapter beside a variant; transformers would load both"))
    too_large = oversized(files)
    problems += [Problem(name, what) for name, what in too_large.items()]
    readable = {name: path for name, path in files.items() if name not in too_large}
    problems += _unsafe(readable)
    problems += _unreadable(readable)
    problems += _hashes(files)
    if problems:
        return problems  # what follows reads these files and would say the same again, less clearly
    # CODEPATH: adapters have no model, processor or facts of their own, but a base.
    if is_adapter:
        return [*_adapter(folder, files, repo_id)]
    problems += _code(files)
    if any(not problem.foreign_code for problem in problems):
        return problems  # code that does not parse registers nothing
    problems += [Problem(*found) for found in reference_problems(files)]
    if any(not problem.foreign_code for problem in problems):
        return problems  # what follows builds a configuration, which may fetch what it refers to
    problems += _configs(folder, files)
    problems += [Problem(*found) for found in token_problems(files)]
    damaged = [Problem(*found) for found in weight_problems(folder)]
    problems += damaged or [Problem(*found) for found in value_problems(folder)]
    problems += _card(folder, files, repo_id)
    return problems


def _unsafe(files: Mapping[str, Path]) -> Iterator[Problem]:
    """Pickles under any name, strange files, secrets, folders of a user's machine."""
    for name, path in files.items():
        if what := looks_like_pickle(path):
            yield Problem(name, f"{what}; such a file can run code when it is loaded")
        elif not _is_expected(name):
            yield Problem(name, "is not a kind of file that a variant's repository holds")
        for what in secrets_in(path):
            yield Problem(name, f"holds {what}")
        if path.suffix != ".png" and path.name not in VOCABULARIES:
            for what in paths_in(path):
                yield Problem(name, f"names a folder of a user's machine, {what}")


def _is_expected(name: str) -> bool:
    """Whether a repository may hold a file of this name; templates of conversations have one place only."""
    path = PurePosixPath(name)
    return path.name in NAMES or (path.suffix in SUFFIXES and (path.suffix != ".jinja" or name in CHAT_TEMPLATES))


def _unreadable(files: Mapping[str, Path]) -> Iterator[Problem]:
    """Text that is not text, JSON and YAML that do not parse."""
    readers: dict[str, Callable[[str], object]] = {".json": json.loads, ".yaml": yaml.safe_load}
    for name, path in files.items():
        if path.suffix not in {".json", ".yaml", ".md", ".txt", ".jinja", ".py"} and path.name not in NAMES:
            continue
        try:
            readers.get(path.suffix, str)(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            yield Problem(name, f"damaged ({str(error).splitlines()[0]})")


def _hashes(files: Mapping[str, Path]) -> Iterator[Problem]:
    """Every file has the sha256 that checksums.json states, and none is left out."""
    if CHECKSUMS not in files:
        return
    try:
        stated = json.loads(files[CHECKSUMS].read_text(encoding="utf-8"))["files"]
        listed = dict(stated)
    except (ValueError, KeyError, TypeError) as error:
        yield Problem(CHECKSUMS, f"is not a list of checksums ({error!r})")
        return
    for name in sorted({*listed, *files} - {CHECKSUMS, *FOREIGN}):
        if name not in files:
            yield Problem(name, f"missing, though {CHECKSUMS} lists it")
        elif name not in listed:
            yield Problem(name, f"not listed in {CHECKSUMS}")
        elif content_hash(files[name]) != listed[name]:
            yield Problem(name, f"was changed: its sha256 is not the one in {CHECKSUMS}")


def _configs(folder: Path, files: Mapping[str, Path]) -> Iterator[Problem]:
    """Backbones pinned to commits; Auto classes that exist; code that runs elsewhere."""
    config, processor = _json(files["config.json"]), _json(files["processor_config.json"])
    for name in ("num_visual_tokens", "num_followup_visual_tokens", "image_token_id"):
        if processor.get(name) != config.get(name):
            yield Problem("processor_config.json", f"{name} is {processor.get(name)!r}, not {config.get(name)!r}")
    source: Any
    for role in ("text", "vision"):
        source, revision = (config.get(f"{role}_model_{key}") for key in ("name_or_path", "revision"))
        if source and is_local(source):
            yield Problem("config.json", f"refers to {source}, a folder of a user's machine")
        elif source and role == "text" and not COMMIT.fullmatch(str(revision or "")):
            yield Problem("config.json", f"refers to {source} at {revision!r} instead of a 40-digit commit")
    for name, wanted in AUTO_CLASSES.items():
        auto_map = _json(files[name]).get("auto_map")
        auto_map = auto_map if isinstance(auto_map, dict) else {}
        for auto in wanted:
            module, _, class_name = str(auto_map.get(auto, "")).partition(".")
            source = files.get(f"{module}.py")
            pattern = re.compile(rf"^class {re.escape(class_name)}\b", re.MULTILINE)
            if source is None or not pattern.search(source.read_text(encoding="utf-8")):
                yield Problem(name, f"auto_map gives {auto} as {auto_map.get(auto)!r}, which is not in the repository")


def _adapter(folder: Path, files: Mapping[str, Path], repo_id: str | None) -> Iterator[Problem]:
    """LoRA weights that are there, a base pinned to a commit, a card that names both and that the Hub takes."""
    allowed = {*ADAPTER_REQUIRED, ADAPTER_WEIGHTS, *FOREIGN}
    for name in files:
        if name not in allowed and not name.startswith(("LICENSE", "NOTICE")):
            yield Problem(name, "is no file of an adapter's repository", foreign_code=is_code(name))
    yield from (Problem(*found) for found in reference_problems(files))
    config = _json(files[ADAPTER_CONFIG])
    if config.get("auto_mapping") not in (None, AUTO_MAPPING):
        yield Problem(ADAPTER_CONFIG, f"auto_mapping is {config['auto_mapping']!r}, which peft would import")
    if config.get("megatron_config") is not None:
        yield Problem(ADAPTER_CONFIG, "asks for another library's code (megatron_config)")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not HUB_ID.fullmatch(base):
        yield Problem(ADAPTER_CONFIG, f"base_model_name_or_path is {base!r}, not a repository")
    if not COMMIT.fullmatch(str(revision)):
        yield Problem(ADAPTER_CONFIG, f"refers to its base at {revision!r} instead of a 40-digit commit")
    try:
        names = [name for tensors in weight_headers(folder).values() for name in tensors]
    except ValueError as error:
        yield Problem(ADAPTER_WEIGHTS, str(error).removeprefix(f"{folder}/{ADAPTER_WEIGHTS}: "))
        return
    if not any(".lora_" in name for name in names):
        yield Problem(ADAPTER_WEIGHTS, "has no LoRA weights")
    yield from (Problem(*found) for found in value_problems(folder) if "zeros" not in found[1])  # B begins as zeros
    text = files[CARD].read_text(encoding="utf-8")
    for what, value in (("base", base), ("base's commit", revision)):
        if str(value) not in text:
            yield Problem(CARD, f"does not name its {what}, {value}")
    sizes = {name: content_size(path) for name, path in files.items()}
    yield from (Problem(CARD, what) for what in lint_card(text, sizes, repo_id))


def _json(path: Path) -> dict:
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}


def _code(files: Mapping[str, Path]) -> Iterator[Problem]:
    """Code that is none of this package's, is no Python, or breaks a rule of code that travels."""
    code = sorted(path for name, path in files.items() if is_code(name))
    claimed = _json(files[FACTS]).get("package_version")
    for found in foreign_code(files, claimed):
        secret = any(True for _ in secrets_in(files[found.name])) if found.name in files else False
        yield Problem(found.name, found.message, "" if secret else found.diff, foreign_code=True)
    broken = False
    for path in code:
        try:
            ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:  # ValueError: null bytes, up to Python 3.11
            broken = True
            yield Problem(path.name, f"is not Python ({error})")
    for message in [] if broken else check_code(code):
        place, what = message.split(": ", 1)
        name, _, line = place.partition(":")
        yield Problem(name, f"line {line}: {what}" if line else what)


def _card(folder: Path, files: Mapping[str, Path], repo_id: str | None) -> Iterator[Problem]:
    """The card against its facts, the facts against the files, and what the Hub would refuse."""
    try:
        facts = CardFacts.from_json(files[FACTS].read_text(encoding="utf-8"))
        check_stated(facts.stated, facts.counted)
    except ValueError as error:
        yield Problem(FACTS, str(error).removeprefix(f"{FACTS}: "))
        return
    yield from _claims(facts, repo_id)
    text = files[CARD].read_text(encoding="utf-8")
    found = differences(text, facts)
    yield from (Problem(CARD, what) for what in found)
    # The same version has the same template, so not one letter may differ.
    if not found and facts.package_version == fusedvlm.__version__ and text != render_card(facts):
        yield Problem(CARD, f"is not the text that {FACTS} renders to")
    sizes = {name: content_size(path) for name, path in files.items()}
    yield from (Problem(CARD, what) for what in lint_card(text, sizes, facts.repo_id))
    yield from _evidence(facts, files)
    yield from (Problem(*found) for found in license_problems(facts, files))
    yield from (Problem(*found) for found in plot_problems(facts, files))
    yield from _counted(folder, files, facts)


def _claims(facts: CardFacts, repo_id: str | None) -> Iterator[Problem]:
    """What facts say about the repository, its family and its scores, by themselves."""
    if repo_id is not None and facts.repo_id != repo_id:
        yield Problem(FACTS, f"is about {facts.repo_id}, this is {repo_id}")
    if facts.package_version not in known_code():
        yield Problem(FACTS, f"was written by fusedvlm {facts.package_version}, which is no released version")
    owner = facts.repo_id.partition("/")[0]
    dial = [Neighbor(0, facts.common.dial)] if facts.common.dial else []
    for other in (*facts.family, *dial):
        if other.repo_id.partition("/")[0] != owner:
            yield Problem(FACTS, f"counts {other.repo_id} among the family, which is not {owner}'s")
    for results, name in ((facts.measured, RESULTS), (facts.control, CONTROL)):
        yield from (Problem(name, what) for what in (score_problems(results) if results else ()))


def _evidence(facts: CardFacts, files: Mapping[str, Path]) -> Iterator[Problem]:
    """The files that the facts speak of are there and say the same."""
    evidence = evidence_files(facts)
    picture = {PICTURE} if facts.example else set()
    if set(facts.files) != {*evidence, *facts.stated.license_files, *picture}:
        yield Problem(FACTS, f"lists the files {list(facts.files)} instead of what it speaks of")
    yield from (Problem(name, "missing, though the facts name it") for name in facts.files if name not in files)
    for name, content in evidence.items():
        if name in files and files[name].read_bytes() != content:
            yield Problem(name, f"is not what {FACTS} says")
    if facts.example and PICTURE in files and content_hash(files[PICTURE]) != facts.example.sha256:
        yield Problem(PICTURE, f"is not the picture that {FACTS} speaks of")
    if facts.common.weights not in (None, weights_digest(dict(files))):
        yield Problem(FACTS, "says that the family shares weights, and these are others")
    if not facts.complete:
        yield Problem(FACTS, "is that of a draft, not of a release")


def _counted(folder: Path, files: Mapping[str, Path], facts: CardFacts) -> Iterator[Problem]:
    """Facts that follow from files, counted again."""
    try:
        counted = asdict(count_facts(folder, dict(files), facts.stated))
    except ValueError as error:
        yield Problem("config.json", str(error).splitlines()[0])
        return
    stated, actual = dict(facts.counted.sha256), counted.pop("sha256")
    if changed := sorted(name for name in {*stated, *actual} if stated.get(name) != actual.get(name)):
        more = f" and of {len(changed) - 3} more" if len(changed) > 3 else ""
        yield Problem(FACTS, f"has another sha256 of {', '.join(changed[:3])}{more} than the files")
    for name, value in asdict(facts.counted).items():
        if name in counted and counted[name] != value:
            yield Problem(FACTS, f"says {name} = {value!r}, the files say {counted[name]!r}")

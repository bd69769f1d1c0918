"""Is a folder the complete and sound repository of a variant? Nothing of it is executed here (see loading.py)."""

import ast
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

import fusedvlm
from fusedvlm.hub_cards.card.lint_card import lint_card
from fusedvlm.hub_cards.card.readback import differences
from fusedvlm.hub_cards.card.render_card import render_card
from fusedvlm.hub_cards.facts import COMMIT, HUB_ID, CardFacts
from fusedvlm.hub_cards.licenses import check_stated
from fusedvlm.hub_cards.release.bundle import Files, check_code, is_local, weight_headers
from fusedvlm.hub_cards.release.release_files import CARD, CHECKSUMS, FACTS, FOREIGN, evidence_files
from fusedvlm.hub_cards.release.run_facts import content_hash, content_size, count_facts

from . import isolated_loading
from .leaks import looks_like_pickle, paths_in, secrets_in
from .weight_shapes import weight_problems

REQUIRED = (
    CARD, FACTS, CHECKSUMS, "LICENSE-CODE", "config.json", "generation_config.json", "processor_config.json",
    "tokenizer_config.json", "chat_template.jinja", "query_tokenizer/tokenizer_config.json", "training/data.json",
)  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_REQUIRED = (CARD, CHECKSUMS, ADAPTER_CONFIG)
AUTO_CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
    "processor_config.json": ("AutoProcessor",),
}
# What `git clone` and `hf download --local-dir` leave beside the files.
BESIDE = (".git/", ".cache/huggingface/")
SUFFIXES = {".json", ".safetensors", ".py", ".md", ".txt", ".jinja", ".png", ".yaml", ".model"}
NAMES = {"LICENSE", "LICENSE-CODE", "NOTICE", ".gitattributes"}
# Only for tokenizers: their entries are pieces of text that may look like anything.
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file (path in the repository), and what."""

    file: str
    message: str

    def __str__(self) -> str:
        return " ".join(f"{self.file}: {self.message}".split())


def check_files(files: Files, repo_id: str | None = None) -> list[Problem]:
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
                target.symlink_to(Path(content).resolve())
        return check_static(folder, repo_id)


def check_folder(path: Path, repo_id: str | None = None, load: bool = True) -> list[Problem]:
    """Problems of a folder. When its files are sound, it is also loaded and asked where this package is not installed;
    an adapter is not, because its base lies elsewhere.

    Raises:
        ValueError: when there is no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder.")
    problems = check_static(path, repo_id)
    # Code that is not what its checksum says must not run.
    if (
        load
        and not problems
        and not (path / ADAPTER_CONFIG).exists()
        and (message := isolated_loading.loading_problem(path))
    ):
        problems.append(Problem("config.json", message))
    return problems


def check_static(folder: Path, repo_id: str | None = None) -> list[Problem]:
    """Problems of a folder's files, without running anything of it."""
    files = folder_files(folder)
    is_adapter = ADAPTER_CONFIG in files
    required = ADAPTER_REQUIRED if is_adapter else REQUIRED
    problems = [Problem(name, "missing") for name in required if name not in files]
    if not any(name.endswith(".safetensors") for name in files):
        problems.append(Problem("adapter_model.safetensors" if is_adapter else "model.safetensors", "missing"))
    problems += _unsafe(files)
    problems += _unreadable(files)
    problems += _hashes(files)
    if problems:
        return problems  # what follows reads these files and would say the same again, less clearly
    # CODEPATH: adapters have no model, processor or facts of their own, but a base.
    if is_adapter:
        return [*_adapter(folder, files, repo_id)]
    problems += _configs(folder, files)
    problems += [Problem(*found) for found in weight_problems(folder)]
    problems += _card(folder, files, repo_id)
    return problems


def folder_files(folder: Path) -> dict[str, Path]:
    """{path in the repository: file}, sorted."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not name.startswith(BESIDE)}


def _unsafe(files: Mapping[str, Path]) -> Iterator[Problem]:
    """Pickles under any name, strange files, secrets, folders of somebody's machine."""
    for name, path in files.items():
        if what := looks_like_pickle(path):
            yield Problem(name, f"{what}; such a file can run code when it is loaded")
        elif path.suffix not in SUFFIXES and path.name not in NAMES:
            yield Problem(name, "is not a kind of file that a variant's repository holds")
        for what in secrets_in(path):
            yield Problem(name, f"holds {what}")
        if path.suffix != ".png" and path.name not in VOCABULARIES:
            for what in paths_in(path):
                yield Problem(name, f"names a folder of somebody's machine, {what}")


def _unreadable(files: Mapping[str, Path]) -> Iterator[Problem]:
    """Text that is not text, JSON and YAML that do not parse."""
    readers = {".json": json.loads, ".yaml": yaml.safe_load}
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
    for role in ("text", "vision"):
        name, revision = (config.get(f"{role}_model_{key}") for key in ("name_or_path", "revision"))
        if name and is_local(name):
            yield Problem("config.json", f"refers to {name}, a folder of somebody's machine")
        elif name and role == "text" and not COMMIT.fullmatch(revision or ""):
            yield Problem("config.json", f"refers to {name} at {revision!r} instead of a 40-digit commit")
    yield from _code(sorted(path for name, path in files.items() if path.suffix == ".py"))
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
    config = _json(files[ADAPTER_CONFIG])
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not HUB_ID.fullmatch(base):
        yield Problem(ADAPTER_CONFIG, f"base_model_name_or_path is {base!r}, not a repository")
    if not COMMIT.fullmatch(str(revision)):
        yield Problem(ADAPTER_CONFIG, f"refers to its base at {revision!r} instead of a 40-digit commit")
    try:
        names = [name for tensors in weight_headers(folder).values() for name in tensors]
    except ValueError as error:
        yield Problem("adapter_model.safetensors", str(error).removeprefix(f"{folder}/adapter_model.safetensors: "))
        return
    if not any(".lora_" in name for name in names):
        yield Problem("adapter_model.safetensors", "has no LoRA weights")
    text = files[CARD].read_text(encoding="utf-8")
    for what, value in (("base", base), ("base's commit", revision)):
        if str(value) not in text:
            yield Problem(CARD, f"does not name its {what}, {value}")
    sizes = {name: content_size(path) for name, path in files.items()}
    yield from (Problem(CARD, what) for what in lint_card(text, sizes, repo_id))


def _json(path: Path) -> dict:
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}


def _code(files: list[Path]) -> Iterator[Problem]:
    """Code that is no Python, or breaks a rule of code that travels."""
    broken = False
    for path in files:
        try:
            ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:  # ValueError: null bytes, up to Python 3.11
            broken = True
            yield Problem(path.name, f"is not Python ({error})")
    for message in [] if broken else check_code(files):
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
    if repo_id is not None and facts.repo_id != repo_id:
        yield Problem(FACTS, f"is about {facts.repo_id}, this is {repo_id}")
    text = files[CARD].read_text(encoding="utf-8")
    found = differences(text, facts)
    yield from (Problem(CARD, what) for what in found)
    # The same version has the same template, so not one letter may differ.
    if not found and facts.package_version == fusedvlm.__version__ and text != render_card(facts):
        yield Problem(CARD, f"is not the text that {FACTS} renders to")
    sizes = {name: content_size(path) for name, path in files.items()}
    yield from (Problem(CARD, what) for what in lint_card(text, sizes, facts.repo_id))
    evidence = evidence_files(facts)
    if set(facts.files) != {*evidence, *facts.stated.license_files}:
        yield Problem(FACTS, f"lists the files {list(facts.files)} instead of what it speaks of")
    yield from (Problem(name, "missing, though the facts name it") for name in facts.files if name not in files)
    for name, content in evidence.items():
        if name in files and files[name].read_bytes() != content:
            yield Problem(name, f"is not what {FACTS} says")
    yield from _counted(folder, files, facts)


def _counted(folder: Path, files: Mapping[str, Path], facts: CardFacts) -> Iterator[Problem]:
    """Facts that follow from files, counted again."""
    try:
        counted = asdict(count_facts(folder, dict(files), facts.stated))
    except ValueError as error:
        yield Problem("config.json", str(error).splitlines()[0])
        return
    for name, value in asdict(facts.counted).items():
        if counted[name] != value:
            yield Problem(FACTS, f"says {name} = {value!r}, the files say {counted[name]!r}")

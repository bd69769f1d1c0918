"""Gather a variant's own files for its repository: remote code, configurations, tokenizers, weights.

Files that travel under `trust_remote_code` are found by pattern, checked against the rules that transformers' loader
imposes on them, and every Auto class they register is written into `auto_map`.
"""

import ast
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fusedvlm.files import read_json
from fusedvlm.hub_cards.facts import COMMIT
from fusedvlm.hub_code import code_files
from fusedvlm.model_source import HUB_ID, require_folder
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import CUSTOM_FILE
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import LANGUAGE_PREFIXES

LIBRARIES = {"torch", "torchvision", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}
# What a variant repository holds besides code and card; everything else in the folder stays at home.
VARIANT_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "query_tokenizer/*",
)
# Written anew for every release, so a copy in the folder is neither taken nor worth a note.
WRITTEN_ANEW = {
    "README.md", "LICENSE", "LICENSE-CODE", "NOTICE", "facts.json", "facts.yaml", "checksums.json", "results.json",
    "swapped.json", "run.json", "example.json", "example.png",
}  # fmt: skip
# transformers' own expressions for the files a module needs (dynamic_module_utils.get_relative_imports).
SCANNER = (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import")

Content = Path | bytes
Files = dict[str, Content]


def check_code(files: list[Path]) -> list[str]:
    """What in these files would break under `trust_remote_code`, one line each; empty when all is well."""
    problems = []
    names = [path.name for path in files]
    problems += [
        f"{name}: two files of this name would land side by side" for name in set(names) if names.count(name) > 1
    ]
    stems = {path.stem for path in files}
    node: Any
    for path in files:
        text = path.read_text(encoding="utf-8")
        relative: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            problems += [f"{path.name}:{node.lineno}: {what}" for what in _import_problems(node, stems, relative)]
        seen = {match for pattern in SCANNER for match in re.findall(pattern, text, re.MULTILINE)}
        problems += [f"{path.name}: transformers does not see the import of .{name}" for name in relative - seen]
        problems += [f"{path.name}: a line reads like an import of .{name}, but is none" for name in seen - relative]
    return problems


def _import_problems(node: ast.AST, stems: set[str], relative: set[str]) -> list[str]:
    """What is wrong with one import; good relative ones are added to `relative`."""
    if isinstance(node, ast.Import):
        roots = [alias.name.split(".")[0] for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        roots = [str(node.module).split(".")[0]]
    elif isinstance(node, ast.ImportFrom):
        if node.level > 1 or node.module is None or "." in node.module:
            return ["only `from .name import x` reaches a file of the same folder"]
        relative.add(node.module)
        return [] if node.module in stems else [f".{node.module} does not travel with the variant"]
    else:
        return []
    return [
        f"imports {root}, which users may not have" for root in roots if root not in LIBRARIES | sys.stdlib_module_names
    ]


def auto_maps(files: list[Path]) -> dict[str, list[str]]:
    """{Auto class: ["module.Class", ...]} from the `register_for_auto_class` calls of these files."""
    found: dict[str, list[str]] = {}
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            call: Any = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
            if call is not None and getattr(call.func, "attr", None) == "register_for_auto_class":
                found.setdefault(call.args[0].value, []).append(f"{path.stem}.{call.func.value.id}")
    return found


def bundle(folder: Path) -> tuple[Files, list[str]]:
    """Files of a variant's repository without its card, and notes on what was changed or left at home.

    Args:
        folder: a saved variant.

    Raises:
        ValueError: when the folder is not a complete variant, refers to a language model that others cannot load, or
            the code breaks an import rule; the message names the file.
    """
    code = [_own_connector(folder, path) for path in code_files()]
    if problems := check_code(code):
        raise ValueError(f"The code that travels with a variant breaks a rule: {problems[0]}")
    files: Files = {path.relative_to(folder).as_posix(): path for path in _matching(folder)}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if name not in files:
            raise ValueError(f"{folder}: not a complete variant, {name} is missing.")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{folder}: not a complete variant, it has no weights in safetensors format.")
    maps = auto_maps(code)
    notes: list[str] = []
    for name in [name for name in files if name.endswith("config.json")]:
        data = read_json(folder / name)
        cleaned = _clean(name, data, maps, self_contained(folder), notes)
        if cleaned != data:
            files[name] = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    files.update({path.name: path for path in code})
    kept = set(files) | WRITTEN_ANEW
    notes += [
        f"{path.name} stays here" for path in sorted(folder.iterdir()) if path.is_file() and path.name not in kept
    ]
    return files, notes


def _own_connector(folder: Path, path: Path) -> Path:
    """The variant's copy of the one file that may hold a connector of its own; every other file is the package's."""
    own = folder / path.name
    return own if path.name == CUSTOM_FILE and own.is_file() else path


def _matching(folder: Path) -> list[Path]:
    require_folder(folder)
    return sorted({path for pattern in VARIANT_PATTERNS for path in folder.glob(pattern) if path.is_file()})


def weight_headers(folder: Path) -> dict[str, dict[str, list[int]]]:
    """{file: {tensor: shape}} of the safetensors files, from their headers alone.

    Raises:
        ValueError: naming a damaged file.
    """
    return {path.name: weight_header(path) for path in sorted(folder.glob("*.safetensors"))}


def weight_header(path: Path) -> dict[str, list[int]]:
    """{tensor: shape} of one file. Raises `ValueError` when it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged weights ({error}).") from error


def self_contained(folder: Path) -> bool:
    """Whether the language model's weights are among the variant's own."""
    return any(key.startswith(LANGUAGE_PREFIXES[0]) for keys in weight_headers(folder).values() for key in keys)


def is_local(name: str | None) -> bool:
    """Whether a backbone's name is a folder of this machine rather than a Hub id or a scheme like `open_clip:...`."""
    if not name or ":" in str(name).partition("/")[0]:
        return False
    if not isinstance(name, str):
        return True  # nonsense; refused as if it were a folder
    return Path(name).exists() or not HUB_ID.fullmatch(name)


def _clean(name: str, data: dict, maps: Mapping[str, list[str]], merged: bool, notes: list[str]) -> dict:
    """A configuration file as it may be published: classes named, folders of this machine not."""
    data = json.loads(json.dumps(data))
    if name == "config.json":
        model_classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")
        data["auto_map"] = {auto: maps[auto][0] for auto in model_classes}
        pin_backbones(data, merged, notes)
    elif name == "processor_config.json":
        data["auto_map"] = {"AutoProcessor": maps["AutoProcessor"][0]}
        backends = {"pil" if "_pil_" in place else "torchvision": place for place in maps["AutoImageProcessor"]}
        if isinstance(data.get("image_processor"), dict):
            data["image_processor"]["auto_map"] = {"AutoImageProcessor": backends}
    elif name.endswith("tokenizer_config.json"):
        if "auto_map" in data:
            data["auto_map"] = {"AutoProcessor": maps["AutoProcessor"][0]}
        for field in ("is_local", "local_files_only", "name_or_path"):
            data.pop(field, None)
    return data


def pin_backbones(config: dict, merged: bool, notes: list[str]) -> None:
    """Drop folders of this machine from a model configuration; the language model must be one that others can load."""
    for part in ("vision_config", "text_config", "fuser_config", "answer_config"):
        if isinstance(config.get(part), dict) and is_local(config[part].get("_name_or_path")):
            config[part]["_name_or_path"] = ""
    config.pop("_name_or_path", None)
    if is_local(config.get("vision_model_name_or_path")):
        notes.append("config.json: the vision tower's folder is not named; its weights are in the repository")
        config["vision_model_name_or_path"] = config["vision_model_revision"] = None
    text, revision = config.get("text_model_name_or_path"), config.get("text_model_revision")
    if merged and is_local(text):
        notes.append("config.json: the language model's folder is not named; its weights are in the repository")
        config["text_model_name_or_path"] = config["text_model_revision"] = None
    elif not merged and text is None:
        raise ValueError("config.json refers to no language model and the weights have none; the variant cannot load.")
    elif not merged and is_local(text):
        raise ValueError(
            f"The variant refers to the language model in {text}, which nobody else has; save it with "
            "save_pretrained(..., merged=True), or train it on a language model by Hub id."
        )
    elif text is not None and not COMMIT.fullmatch(revision or ""):
        raise ValueError(
            f"The variant refers to {text} without a commit (text_model_revision={revision!r}); set the 40-digit "
            "commit in its config.json, so that it keeps loading when that repository moves on."
        )

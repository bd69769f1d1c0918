"""Read and write checkpoint folders without ever running pickled code."""

import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fusedvlm.files import read_json, write_json

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
PLACEHOLDER = re.compile(r"<\|placeholder_qed_\d+\|>")
# Every file in which some tokenizer class keeps its vocabulary or its settings.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder (safetensors or .bin, sharded or not), memory-mapped where possible.

    Raises:
        ValueError: when there are no weights, shards or keys are missing, or a .bin file holds anything but tensors.
    """
    for name in INDEX_NAMES:
        if (folder / name).is_file():
            return _read_shards(folder, name)
    files = [folder / name for name in SINGLE_NAMES if (folder / name).is_file()] or sorted(
        folder.glob("*.safetensors")
    )
    if len(files) != 1 and not (files and files[0].name in SINGLE_NAMES):
        raise ValueError(
            f"{folder} has no weights: expected one of {', '.join((*SINGLE_NAMES, *INDEX_NAMES))}, or a single "
            f".safetensors file (found {len(files)})."
        )
    return _read_file(files[0])


def _read_shards(folder: Path, index_name: str) -> dict[str, torch.Tensor]:
    places = read_json(folder / index_name)["weight_map"]
    missing = sorted({file for file in places.values() if not (folder / file).is_file()})
    if missing:
        raise ValueError(f"{folder / index_name} names shards that are not there: {', '.join(missing)}.")
    state = {}
    for file in sorted(set(places.values())):
        state.update(_read_file(folder / file))
    if set(state) != set(places):
        difference = ", ".join(sorted(set(state) ^ set(places)))
        raise ValueError(f"{folder / index_name} and its shards hold different keys: {difference}.")
    return state


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors; it was not loaded, because that could run code.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} is not a plain dictionary of tensors.")
    return state


def read_json_if_there(file: Path) -> dict[str, Any]:
    """A JSON file, or an empty dictionary where there is none."""
    return read_json(file) if file.is_file() else {}


def copy_tokenizer(source: Path, target: Path, with_placeholders: bool = True) -> bool:
    """Copy the tokenizer's own files, so that it loads without the checkpoint's config.

    Args:
        with_placeholders: `False` leaves out the published query placeholders: here queries are not tokens, so that a
            person who types one cannot inject a query.

    Returns:
        Whether there was a tokenizer.
    """
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken") for file in files):
        return False
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if with_placeholders or file.name not in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
            shutil.copyfile(file, target / file.name)
        else:
            document = _without_placeholders(file.name, read_json(file))
            write_json(target / file.name, document, indent=None)
    return True


def _without_placeholders(name: str, document: dict) -> dict:
    if name == "added_tokens.json":
        return {token: row for token, row in document.items() if not PLACEHOLDER.fullmatch(token)}
    if name == "tokenizer_config.json":
        added = document.get("added_tokens_decoder", {})
        kept = {row: token for row, token in added.items() if not PLACEHOLDER.fullmatch(token["content"])}
        return {**document, "added_tokens_decoder": kept} if added else document
    tokens = [token for token in document["added_tokens"] if not PLACEHOLDER.fullmatch(token["content"])]
    return {**document, "added_tokens": tokens}


def first_placeholder_id(folder: Path) -> int | None:
    """Id of the first published query placeholder in a tokenizer folder, None when it has none."""
    found = dict(read_json_if_there(folder / "added_tokens.json"))
    tokens = read_json_if_there(folder / "tokenizer.json").get("added_tokens", [])
    found.update({token["content"]: token["id"] for token in tokens})
    return found.get("<|placeholder_qed_0|>")

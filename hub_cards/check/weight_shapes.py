"""Weights of a variant against its configuration, from headers alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from fusedvlm.hub_cards.release.bundle import weight_header
from fusedvlm.hub_cards.release.run_facts import building_a_model, read_config
from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import LANGUAGE_PREFIXES

INDEX = "model.safetensors.index.json"


def weight_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, what is wrong): damaged files, shards that the index misses, tensors that are none of the model's.

    Self-contained variants hold every tensor, the others all but the language model's.
    """
    headers = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            headers[path.name] = weight_header(path)
        except ValueError as error:
            yield path.name, str(error).removeprefix(f"{path}: ")
    try:
        expected, tied = expected_tensors(folder)
    except ValueError as error:
        yield "config.json", str(error).removeprefix(f"{folder}/config.json: ")
        return
    if len(headers) < len(list(folder.glob("*.safetensors"))):
        return  # what a damaged file holds is not missing
    found = {name: shape for tensors in headers.values() for name, shape in tensors.items()}
    first = min(headers)
    yield from _index_problems(folder, headers)
    inside = any(name.startswith(LANGUAGE_PREFIXES[0]) for name in found)
    wanted = {n: shape for n, shape in expected.items() if inside or not n.startswith(LANGUAGE_PREFIXES)}
    missing, unexpected = sorted(set(wanted) - set(found) - tied), sorted(set(found) - set(wanted))
    if missing:
        yield first, f"{len(missing)} tensors are missing, {missing[0]} first"
    if unexpected:
        yield first, f"{len(unexpected)} tensors belong to no part of the model, {unexpected[0]} first"
    for name in sorted(set(found) & set(wanted)):
        if found[name] != wanted[name]:
            yield first, f"{name} has shape {found[name]}, config.json asks for {wanted[name]}"


def expected_tensors(folder: Path) -> tuple[dict[str, list[int]], set[str]]:
    """{tensor: shape} of the whole model by its configuration, and the tensors that are tied to others."""
    data = read_config(folder, folder / "config.json")
    with building_a_model(folder), torch.device("meta"):
        model = FusedVLMForConditionalGeneration(FusedVLMConfig.from_dict(data))
    tied = set(model.all_tied_weights_keys)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}, tied


def _index_problems(folder: Path, headers: dict[str, dict]) -> Iterator[tuple[str, str]]:
    """A sharded checkpoint's index lists exactly what the shards hold."""
    path = folder / INDEX
    if not path.exists():
        if len(headers) > 1:
            yield INDEX, f"missing, though the weights are in {len(headers)} files"
        return
    listed = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {})
    actual = {name: file for file, tensors in headers.items() for name in tensors}
    if listed != actual:
        wrong = sorted(name for name in {*listed, *actual} if listed.get(name) != actual.get(name))
        yield INDEX, f"{len(wrong)} tensors are not where it says, {wrong[0]} first"

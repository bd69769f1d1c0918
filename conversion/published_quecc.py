"""Published QueCC checkpoints (locuslab llava-token-compression): a LLaVA with its compressor, names and sizes."""

import math
import re
from collections.abc import Iterable

import torch

from .published_names import DROPPED, KeyReport

# Theirs to ours; the joint attention projection is cut in three besides. In a LLaVA checkpoint all of it stands below
# `mm_projector.0.`, and the MLP at `.1` and `.3`.
NAMES = (
    ("text_projection.0.", "question_proj."),
    ("text_projection.1.", "question_norm."),
    ("q_proj.", "query."),
    ("k_proj.", "key."),
    ("v_proj.", "value."),
    ("q_downsample.", "downsample."),
    ("clip_attn.out_proj.", "attention.out_proj."),
)
PARTS = (("0.", "up_proj."), ("2.", "down_proj."), ("3.", "norm."))
JOINT = "clip_attn.in_proj_"


def quecc_names(name: str) -> list[str]:
    """Our names of a compressor's key, three for the joint projection. Raises `ValueError` for a key it has not."""
    if name in (f"{JOINT}weight", f"{JOINT}bias"):
        return [f"attention.{part}_proj.{name.removeprefix(JOINT)}" for part in "qkv"]
    for theirs, ours in NAMES:
        if not name.startswith(theirs):
            continue
        rest = name.removeprefix(theirs)
        if ours in ("query.", "key.", "value."):
            part = next((new + rest.removeprefix(old) for old, new in PARTS if rest.startswith(old)), None)
            if part is None:
                break
            rest = part
        return [ours + rest]
    raise ValueError(f"{name} is no key of a published QueCC compressor.")


def quecc_state(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The compressor's tensors under our names."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        names = quecc_names(name)
        state.update(zip(names, tensor.chunk(len(names)), strict=True))
    return state


# In a LLaVA checkpoint: what stands below each prefix, longest first.
PROJECTOR = re.compile(r"^(?:model\.)?mm_projector\.(\d+)\.(.+)$")
TOWER = "model.vision_tower.vision_tower.vision_model."
MLP = {"1": "model.connector.mlp.layers.0.", "3": "model.connector.mlp.layers.1."}


def is_quecc(names: Iterable[str]) -> bool:
    """Whether these are keys of a LLaVA with a QueCC compressor, or of its projector alone."""
    return any(name.endswith("mm_projector.0.clip_attn.in_proj_weight") for name in names)


def to_ours(names: Iterable[str]) -> KeyReport:
    """Names of a published checkpoint in this package; the joint attention projection becomes three.

    Raises:
        ValueError: naming every key that such a checkpoint does not have.
    """
    report, unknown = KeyReport(), []
    for name in sorted(names):
        reason = next((text for pattern, text in DROPPED[1:] if pattern.search(name)), None)
        if reason is not None:
            report.dropped.append((name, reason))
        elif (renamed := _rename(name)) is None:
            unknown.append(name)
        else:
            report.renamed += [(name, new) for new in renamed if new != name]
            report.used += [new for new in renamed if new == name]
    if unknown:
        raise ValueError(f"{len(unknown)} keys have no place in the model: {', '.join(unknown)}.")
    return report


def _rename(name: str) -> list[str] | None:
    if match := PROJECTOR.match(name):
        number, rest = match.groups()
        if number == "0":
            return [f"model.connector.{new}" for new in quecc_names(rest)]
        return [MLP[number] + rest] if number in MLP else None
    if name.startswith(TOWER):
        return ["model.vision_tower." + name.removeprefix(TOWER)]
    if name.startswith("lm_head."):
        return [name]
    return ["model.language_model." + name.removeprefix("model.")] if name.startswith("model.") else None


def rename_tensors(published: dict[str, torch.Tensor], report: KeyReport) -> dict[str, torch.Tensor]:
    """The tensors under our names; what became three is cut in three."""
    targets: dict[str, list[str]] = {name: [name] for name in report.used}
    for old, ours in report.renamed:
        targets.setdefault(old, []).append(ours)
    state = {}
    for old, new in targets.items():
        state.update({name: part.contiguous() for name, part in zip(new, published[old].chunk(len(new)), strict=True)})
    return state


def connector_fields(state: dict[str, torch.Tensor], published: dict, vision_config: dict) -> dict:
    """`connector`, its settings and m, from the tensors; the stride, which leaves no trace in them, from the config."""
    weight = state["model.connector.downsample.weight"]
    kernel, width = weight.shape[-1], weight.shape[0]
    stride = published.get("mm_vision_token_compression_stride", kernel)
    side = vision_config["image_size"] // vision_config["patch_size"]
    joined, depth = state["model.connector.key.up_proj.weight"].shape[1] // width, vision_config["num_hidden_layers"]
    settings = {"kernel_size": kernel, "stride": stride}
    if joined == 4 and depth >= 24:
        settings["layers"] = [12, 16, 22, 23]  # hard-coded in the published code, whatever the tower
    m = ((side - kernel) // stride + 1) ** 2 if stride else 0
    if math.isqrt(m) < 1:
        raise ValueError(f"A kernel of {kernel} and a stride of {stride} give no query on a {side} x {side} grid.")
    return {
        "connector": "quecc",
        "connector_config": settings,
        "num_visual_tokens": m,
        "trained_num_visual_tokens": [m],
        "trained_num_visual_tokens_is_range": False,
    }

"""Published QueCC checkpoints (locuslab llava-token-compression): names of the compressor and of the MLP behind it."""

import torch

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
    state = {}
    for name, tensor in published.items():
        names = quecc_names(name)
        state.update(zip(names, tensor.chunk(len(names)), strict=True))
    return state

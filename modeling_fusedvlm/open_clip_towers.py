"""open_clip vision transformers as transformers CLIP towers, converted when a model is built.

Everything is read from the built open_clip module, so whatever open_clip decides (quick GELU for OpenAI weights, head
width, epsilons) is what the tower does. A saved variant holds a plain CLIP tower and never needs open_clip.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

SCHEME = "open_clip:"


def load_open_clip_tower(name: str) -> CLIPVisionModel:
    """Vision tower of an open_clip model, with the model's normalization in its config (`image_mean`, `image_std`).

    Args:
        name: what follows "open_clip:": `MODEL@WEIGHTS` with an open_clip model name or the path of its JSON config,
            and a pretrained tag or the path of a checkpoint; or `hf-hub:REPO` or `local-dir:FOLDER`, which have both.

    Raises:
        ValueError: listing the tags or models there are, or naming what a CLIP tower cannot express.
    """
    import open_clip

    name = name.removeprefix(SCHEME)
    model_name, _, weights = name.partition("@")
    if not model_name.startswith(("hf-hub:", "local-dir:")):
        model_name = _model_name(model_name)
        if not weights:
            tags = open_clip.list_pretrained_tags_by_model(model_name)
            raise ValueError(
                f"open_clip:{name} names no weights; write open_clip:{model_name}@TAG with a checkpoint file or one of "
                f"{', '.join(tags) or '(no published tags)'}."
            )
    model = open_clip.create_model(model_name, pretrained=weights or None)
    return convert_open_clip_tower(model.visual)


def _model_name(name: str) -> str:
    """A known model name; a path to a JSON config is made known first."""
    import open_clip

    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        open_clip.add_model_config(path)
        return path.stem
    if open_clip.get_model_config(name) is None:
        raise ValueError(f"open_clip has no model {name}; it has {', '.join(open_clip.list_models())}.")
    return name


def convert_open_clip_tower(visual: Any) -> CLIPVisionModel:
    """An open_clip `VisionTransformer` (an `nn.Module`) as a `CLIPVisionModel` of the same tokens and pooled state.

    open_clip's `ln_post` becomes `post_layernorm`; its output projection is left out, nothing here reads it.

    Raises:
        ValueError: naming what a CLIP tower cannot express.
    """
    _refuse_what_cannot_be_expressed(visual)
    tower = CLIPVisionModel._from_config(open_clip_config(visual), dtype=visual.conv1.weight.dtype)
    tower.load_state_dict(open_clip_state(visual), strict=True, assign=visual.conv1.weight.device.type == "meta")
    return tower.eval()


def _refuse_what_cannot_be_expressed(visual: Any) -> None:
    problems = []
    if not hasattr(visual, "conv1") or not hasattr(visual, "transformer"):
        raise ValueError(
            f"open_clip builds this tower as {type(visual).__name__}, which is not its own ViT; load it through "
            "transformers (SigLIP towers are there)."
        )
    block = visual.transformer.resblocks[0]
    if getattr(visual, "attn_pool", None) is not None:
        problems.append("attentional pooling, whose last norm is not over patches")
    if not isinstance(visual.ln_pre, nn.LayerNorm):
        problems.append("no LayerNorm before the first layer")
    if not isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
        problems.append(f"{type(getattr(block, 'attn', block)).__name__} instead of plain attention")
    if visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]:
        problems.append(f"views of {visual.image_size} in patches of {visual.patch_size}, which are not square")
    if problems:
        raise ValueError(f"A CLIP tower cannot express this open_clip tower: {'; '.join(problems)}.")


def open_clip_config(visual: Any) -> CLIPVisionConfig:
    """Config of the tower. Raises `ValueError` for an activation CLIP towers do not have."""
    block = visual.transformer.resblocks[0]
    preprocessing = getattr(visual, "preprocess_cfg", None) or {}
    return CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        hidden_act=_activation(block.mlp.gelu),
        layer_norm_eps=block.ln_1.eps,
        projection_dim=visual.output_dim,
        **{  # type: ignore[arg-type]
            f"image_{name}": [float(value) for value in preprocessing[name]]
            for name in ("mean", "std")
            if name in preprocessing
        },
    )


def _activation(module: nn.Module) -> str:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise ValueError(f"A CLIP tower has no activation like open_clip's {type(module).__name__}.")


def open_clip_state(visual: Any) -> dict[str, torch.Tensor]:
    """Weights of the tower under CLIP's names; layer scales are folded into the layer they scale."""
    theirs = visual.state_dict()
    state = {
        "embeddings.class_embedding": theirs["class_embedding"],
        "embeddings.patch_embedding.weight": theirs["conv1.weight"],
        "embeddings.position_embedding.weight": theirs["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        state[f"pre_layrnorm.{kind}"] = theirs[f"ln_pre.{kind}"]
        state[f"post_layernorm.{kind}"] = theirs[f"ln_post.{kind}"]
    for number in range(len(visual.transformer.resblocks)):
        state.update(_layer_state(theirs, f"transformer.resblocks.{number}.", f"encoder.layers.{number}."))
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _layer_state(theirs: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    state = {}
    for kind in ("weight", "bias"):
        projections = theirs[f"{old}attn.in_proj_{kind}"].chunk(3)
        state.update(
            {f"{new}self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", projections, strict=True)}
        )
        for theirs_name, ours in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_proj", "mlp.fc2")):
            scale = theirs.get(f"{old}ls_{1 if 'attn' in ours else 2}.gamma")
            tensor = theirs[f"{old}{theirs_name}.{kind}"]
            if scale is not None:
                tensor = tensor * (scale[:, None] if kind == "weight" else scale)
            state[f"{new}{ours}.{kind}"] = tensor
        for theirs_name, ours in (("mlp.c_fc", "mlp.fc1"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
            state[f"{new}{ours}.{kind}"] = theirs[f"{old}{theirs_name}.{kind}"]
    return state

"""The published tiny model, loaded into this package."""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration

FOLDER = Path(__file__).parents[1] / "oracle"
IMAGE_TOKEN_ID = 0  # <unk>: the published code reuses the eos id, which is ambiguous


def arrays(name: str) -> dict[str, np.ndarray]:
    """Arrays of one case file."""
    return dict(np.load(FOLDER / f"{name}.npz"))


def our_name(name: str) -> str:
    """Parameter name in this package for a published one."""
    vision = "imgque_backbone.clip_model.vision_model."
    if name.startswith(vision):
        name = name[len(vision) :]
        special = {"token_LF": "model.merger.newline", "vision_embed_merge.weight": "model.merger.conv.weight"}
        return special.get(name, "model.vision_tower." + name.replace("pos_layrnorm", "post_layernorm"))
    for theirs, ours in (
        ("imgque_backbone.imgque_model.", "model.fuser."),
        ("fusion_backbone.imgque_proj.", "model.projector."),
        ("llm_backbone.model.", "model.language_model."),
        ("llm_backbone.lm_head.", "lm_head."),
    ):
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    raise KeyError(name)


def config() -> FusedVLMConfig:
    """Sizes of the published tiny model, from its own config."""
    published = json.loads((FOLDER / "vlm_config.json").read_text())
    fusion, llm = published["imgque_config"], published["llm_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

    def pick(source: dict, *more: str) -> dict:
        return {name: source[name] for name in (*sizes, *more)}

    return FusedVLMConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **pick(fusion["vision_config"], "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
        },
        fuser_config={**pick(fusion["imgque_config"], "vocab_size", "rms_norm_eps"), "eos_token_id": 319},
        text_config={"model_type": "llama", **pick(llm, "vocab_size", "rms_norm_eps", "max_position_embeddings")},
        num_visual_tokens=published["length_que_end"],
        num_followup_visual_tokens=published["length_que_end_short"],
        first_query_token_id=320,
        image_token_id=IMAGE_TOKEN_ID,
    )


def model() -> FusedVLMForConditionalGeneration:
    """The published weights under our names, every one of them used."""
    ours = FusedVLMForConditionalGeneration(config()).eval()
    state = {our_name(name): tensor.float() for name, tensor in load_file(FOLDER / "vlm_state.safetensors").items()}
    ours.load_state_dict(state, strict=True)
    return ours

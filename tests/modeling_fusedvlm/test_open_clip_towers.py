"""open_clip and SigLIP towers inside the model, against their own forward passes."""

import json

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower
from transformers import SiglipVisionConfig, SiglipVisionModel

from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.modeling_fusedvlm.open_clip_towers import convert_open_clip_tower, load_open_clip_tower, open_clip_config
from fusedvlm.tests import tiny

TOWERS = {
    "plain": {},
    "quick gelu": {"quick_gelu": True},
    "head width 20": {"width": 60, "head_width": 20},
    "mlp ratio of ViT-g": {"mlp_ratio": 4.3637},
    "27 x 27 grid of 378 pixels": {"image_size": 378, "patch_size": 14, "width": 32, "head_width": 8, "layers": 1},
    "layer scale": {"ls_init_value": 0.3},
    "norm after pooling": {"final_ln_after_pool": True},
    "other epsilon": {"norm_kwargs": {"eps": 1e-6}},
    "tanh gelu": {"act_kwargs": {"approximate": "tanh"}},
}


def build(quick_gelu=False, **vision):
    """A random open_clip tower whose parameters are all in use, layer norms and biases included."""
    torch.manual_seed(0)
    config = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 4, "image_size": 24, **vision}
    visual = _build_vision_tower(20, config, quick_gelu).eval()
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    visual.output_tokens = True
    return visual


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_same_pooled_state_and_patch_tokens(name):
    visual = build(**TOWERS[name])
    tower = convert_open_clip_tower(visual)
    pixels = torch.randn(2, 3, *visual.image_size)
    pooled, patches = visual(pixels)
    outputs = tower(pixels)
    assert (outputs.pooler_output @ visual.proj - pooled).abs().max() <= 1e-4
    states = outputs.last_hidden_state
    states = states if visual.final_ln_after_pool else tower.post_layernorm(states)
    assert patches.shape[1] == (visual.image_size[0] // visual.patch_size[0]) ** 2
    assert (states[:, 1:] - patches).abs().max() <= 1e-4
    assert patches.abs().max() > 0.5  # so that the bound means something


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-L-14-336-quickgelu", (1024, 24, 16, 336, 14, 4096, "quick_gelu", 577)),
        ("ViT-H-14", (1280, 32, 16, 224, 14, 5120, "gelu", 257)),
        ("ViT-H-14-378-quickgelu", (1280, 32, 16, 378, 14, 5120, "quick_gelu", 730)),
        ("ViT-bigG-14", (1664, 48, 16, 224, 14, 8192, "gelu", 257)),
    ],
)
def test_published_sizes(name, expected):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
        tower = convert_open_clip_tower(visual)
    found = tower.config
    sizes = (found.hidden_size, found.num_hidden_layers, found.num_attention_heads, found.image_size)
    more = (found.patch_size, found.intermediate_size, found.hidden_act)
    positions = tower.embeddings.position_embedding.weight.shape[0]
    assert (*sizes, *more, positions) == expected


def test_every_open_clip_vit_converts_or_says_why_not():
    refused = {}
    converted = 0
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
            continue  # not open_clip's own ViT
        with torch.device("meta"):
            visual = _build_vision_tower(config["embed_dim"], {**vision, "layers": 1}, config.get("quick_gelu", False))
            try:
                convert_open_clip_tower(visual)
                converted += 1
            except ValueError as error:
                refused[name] = str(error)
    assert converted >= 45
    coca = {name for name in refused if "attentional pooling" in refused[name]}
    clipa = {name for name in refused if "no LayerNorm before the first layer" in refused[name]}
    assert all(name.startswith("coca_") for name in coca), refused
    assert all("CLIPA" in name for name in clipa), refused
    assert coca | clipa == set(refused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attentional_pool": True}, "attentional pooling"),
        ({"no_ln_pre": True}, "no LayerNorm before the first layer"),
        ({"qk_norm": True}, "instead of plain attention"),
        ({"image_size": (24, 16)}, r"views of \(24, 16\)"),
        ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64}, "ModifiedResNet"),
    ],
)
def test_what_a_clip_tower_cannot_express_is_named(change, message):
    config = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 24, **change}
    with pytest.raises(ValueError, match=message):
        convert_open_clip_tower(_build_vision_tower(24, config))


@pytest.fixture
def local_model(tmp_path):
    """An open_clip model as a JSON config and a checkpoint file, with the model itself."""
    vision = {"layers": 2, "width": tiny.WIDTH, "head_width": 16, "patch_size": 4, "image_size": tiny.IMAGE_SIZE}
    text = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-vit.json").write_text(json.dumps({"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-vit.json")
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-vit").eval()
    torch.save(model.state_dict(), tmp_path / "tiny-vit.pt")
    return tmp_path, model


@torch.no_grad()
def test_local_config_and_checkpoint_become_a_model_that_never_needs_open_clip(local_model, backbones, tmp_path):
    folder, source = local_model
    name = f"open_clip:{folder / 'tiny-vit.json'}@{folder / 'tiny-vit.pt'}"
    model = tiny.build_model(backbones, vision=name)
    source.visual.output_tokens = True
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    expected = model.model.merger(source.visual(pixels)[1])
    tokens, _ = model.model.get_view_features(pixels)
    assert (tokens - expected).abs().max() <= 1e-4
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.vision_model_name_or_path == name
    model.save_pretrained(tmp_path / "variant")
    saved = FusedVLMForConditionalGeneration.from_pretrained(tmp_path / "variant")
    assert torch.equal(saved.model.get_view_features(pixels)[0], tokens)
    assert "open_clip" not in "".join(file.read_text() for file in (tmp_path / "variant").glob("*.py"))
    # The views are normalized as open_clip does it.
    processor = tiny.build_tiny_processor(model)
    assert list(processor.image_processor.image_mean) == pytest.approx(list(source.visual.preprocess_cfg["mean"]))


def test_weights_must_be_named():
    with pytest.raises(ValueError, match=r"names no weights; write open_clip:ViT-L-14-336@TAG .* openai"):
        load_open_clip_tower("ViT-L-14-336")
    with pytest.raises(ValueError, match=r"open_clip has no model ViT-Z; it has .*ViT-H-14"):
        load_open_clip_tower("open_clip:ViT-Z@laion")


@pytest.mark.parametrize("image_size", [24, 28], ids=["even grid", "odd grid"])
@torch.no_grad()
def test_siglip_tower_without_a_class_token(backbones, tmp_path, image_size):
    torch.manual_seed(2)
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=tiny.WIDTH,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=4,
        )
    ).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    model = tiny.build_model(backbones, vision=str(tmp_path / "siglip"))
    side = image_size // 4
    assert model.config.tokens_per_view == ((side + 1) // 2) ** 2 + 1
    pixels = torch.randn(2, 3, image_size, image_size)
    expected = model.model.merger(siglip(pixels).last_hidden_state)  # its own final norm is applied inside
    tokens, _ = model.model.get_view_features(pixels)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "variant")
    loaded, report = FusedVLMForConditionalGeneration.from_pretrained(tmp_path / "variant", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(loaded.model.get_view_features(pixels)[0], tokens)


def test_config_of_a_tower_without_preprocessing_has_no_statistics():
    assert not hasattr(open_clip_config(build()), "image_mean")

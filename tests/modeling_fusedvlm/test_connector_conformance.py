"""Connectors against the published code's numbers, to 5e-5 of max(1, |reference|)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector_anchored import FusedVLMAnchoredConnector
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector_parts import FusedVLMConnectorAttention
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector_quecc import grid_blocks
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector_resampler import resize_positions
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import connector_class

ORACLE = Path(__file__).parents[1] / "oracle"
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 84,
    "patch_size": 14,
}


def cases(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(ORACLE / "reducers" / name / "cases.npz").items()}


def weights(name: str, file: str) -> dict[str, torch.Tensor]:
    return load_file(ORACLE / "reducers" / name / file)


def make(connector: str, vision=None, width: int = 48, **fields):
    """A connector on a 6 x 6 grid, LLM width 48."""
    text = {"model_type": "llama", "hidden_size": width, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = FusedVLMConfig(vision_config={**TOWER, **(vision or {})}, text_config=text, connector=connector, **fields)
    return connector_class(connector)(config).eval()


MLP = {"0.weight": "0.weight", "0.bias": "0.bias", "2.weight": "1.weight", "2.bias": "1.bias"}


def mlp(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA's sequence of linear layers and GELU under our names."""
    return {f"mlp.layers.{ours}": published[theirs] for theirs, ours in MLP.items()}


def assert_conforms(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-5) -> None:
    assert found.shape == expected.shape
    assert ((found - expected).abs() / expected.abs().clamp(min=1)).max() <= tolerance


def attention_weights(published: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """`nn.MultiheadAttention`'s joint projection as three."""
    found = {}
    for kind in ("weight", "bias"):
        parts = published[f"{prefix}in_proj_{kind}"].chunk(3)
        found |= {f"attention.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        found[f"attention.out_proj.{kind}"] = published[f"{prefix}out_proj.{kind}"]
    return found


@torch.no_grad()
def test_dense_is_llavas_mlp():
    connector, case = make("dense"), cases("llava")
    state = weights("llava", "projectors.safetensors")
    connector.load_state_dict(mlp({name: state[f"mlp2x_gelu.{name}"] for name in MLP}))
    assert_conforms(connector.reduce(case["features_patch_-2"], 36), case["mlp2x_gelu_patch_-2_tokens"])


@torch.no_grad()
def test_pooling_after_the_projector_is_m3s():
    connector, case = make("pool", num_visual_tokens=36), cases("m3")
    state = weights("m3", "projector.safetensors")
    connector.load_state_dict(mlp(state))
    assert_conforms(connector.reduce(case["features_m2_patches"], 36), case["projected"])
    for m in (4, 9):
        assert_conforms(connector.reduce(case["features_m2_patches"], m), case[f"s{m}_tokens"])


@torch.no_grad()
def test_pooling_before_the_projector_is_tokenflexs():
    connector, case = make("pool", connector_config={"order": "pool_first"}, num_visual_tokens=36), cases("tokenflex")
    names = {"layernorm": "norm", "f1": "gate_proj", "f2": "up_proj", "g": "down_proj"}
    state = weights("tokenflex", "projector.safetensors")
    renamed = {name.split(".", 1)[1]: tensor for name, tensor in state.items()}
    renamed = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in renamed.items()}
    connector.load_state_dict(renamed)
    for m in (4, 16):
        assert_conforms(connector.reduce(case["features_m2_patches"], m), case[f"n{m}_tokens"])


@pytest.fixture(scope="module")
def mqt():
    settings = {"num_queries": 16, "num_heads": 4}
    connector = make("resampler", connector_config=settings, num_visual_tokens=16)
    state = weights("mqt", "resampler.safetensors")
    names = {"ln_q": "query_norm", "ln_k": "key_norm", "ln_v": "value_norm"}
    norms = {f"{names[k[:4]]}.{k[5:]}": v for k, v in state.items() if k[:4] in names}
    connector.load_state_dict(
        {"query": state["query"], "projection.weight": state["proj"].T, **norms, **attention_weights(state, "attn.")}
    )
    return connector, state


@torch.no_grad()
def test_the_resampler_is_mqts(mqt):
    connector, state = mqt
    case = cases("mqt")
    views = case["features_m2_patches"]
    places = connector._positions(views)
    assert torch.equal(places, state["pos_embed"])
    assert_conforms(resize_positions(places, 6), case["key_pos_embed_6x6"])
    for m in (1, 4):
        assert_conforms(connector.reduce(views, m), case[f"m{m}_tokens"])


@torch.no_grad()
def test_keys_see_the_image_only_when_asked(mqt):
    connector, _ = mqt
    seen = make(
        "resampler", connector_config={"num_queries": 16, "num_heads": 4, "keys": "image"}, num_visual_tokens=16
    )
    seen.load_state_dict(connector.state_dict())
    views = cases("mqt")["features_m2_patches"]
    # A learned linear pooling: the map of normalized patches to tokens is affine when keys are positions alone.
    ones, zeros = connector.value_norm(views[:1]), connector.value_norm(views[1:2])
    for module, is_linear in ((connector, True), (seen, False)):
        values = module.value_norm
        module.value_norm = torch.nn.Identity()
        mixed = module.reduce((ones + zeros) / 2, 4)
        parts = (module.reduce(ones, 4) + module.reduce(zeros, 4)) / 2
        module.value_norm = values
        assert torch.allclose(mixed, parts, atol=1e-5) == is_linear


@torch.no_grad()
def test_quecc_is_the_published_compressor():
    inputs = {k: torch.from_numpy(v).float() for k, v in np.load(ORACLE / "quecc" / "g_quecc_inputs.npz").items()}
    state = {k: v.float() for k, v in load_file(ORACLE / "quecc" / "g_quecc_k3s3.safetensors").items()}
    connector = make("quecc", {"hidden_size": 32}, width=40, connector_config={"kernel_size": 3}, num_visual_tokens=4)
    from fusedvlm.conversion.published_quecc import quecc_state

    renamed = quecc_state(state)
    missing, unexpected = connector.load_state_dict(renamed, strict=False)
    assert unexpected == []
    assert all(name.startswith("mlp.") for name in missing)
    found = connector.compress(inputs["x"], inputs["x_multi"], inputs["text_features"][:, 0])
    expected = torch.from_numpy(np.load(ORACLE / "quecc" / "g_quecc_k3s3.npz")["output"])
    assert_conforms(found, expected)


def test_blocks_are_cut_row_by_row():
    tokens = torch.arange(36.0)[None, :, None]
    blocks = grid_blocks(tokens, 2)
    assert blocks.shape == (4, 9, 1)
    assert blocks[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert blocks[2, :, 0].tolist() == [18, 19, 20, 24, 25, 26, 30, 31, 32]


def test_attention_is_that_of_torch():
    ours, torchs = FusedVLMConnectorAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    state = attention_weights(dict(torchs.state_dict().items()), "")
    ours.load_state_dict({name.removeprefix("attention."): tensor for name, tensor in state.items()})
    q, k, v = torch.randn(2, 3, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    expected = torchs(q, k, v, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(ours(q, k, v, mask), expected)


@pytest.mark.parametrize("size", ["routing_224", "routing_448"])
def test_anchors_and_queries_are_shared_out_as_in_parcel(size):
    table = json.loads((ORACLE / "reducers" / "parcel" / "cases.json").read_text())[size]
    side = 16 if size == "routing_224" else 32
    tower = {"image_size": 14 * side}
    largest = max(case["B"] for case in table["cases"])
    config = FusedVLMConfig(
        vision_config={**TOWER, **tower}, connector="anchored", num_visual_tokens=largest, fuse_question=False
    )
    kind = FusedVLMAnchoredConnector
    assert config.connector_config["num_queries"] == (192 if size == "routing_224" else 768)
    from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector_anchored import _num_anchors

    for case in table["cases"]:
        anchors, queries = case["N_p_N_q"]
        assert case["B"] in kind.counts(config)
        assert _num_anchors(config.connector_config["anchor_grids"], case["B"]) == anchors
        assert case["B"] - anchors == queries
    assert 15 not in kind.counts(config)


@pytest.mark.parametrize(
    ("connector", "settings"),
    [("pool", {}), ("resampler", {"num_queries": 36}), ("resampler", {"num_queries": 36, "keys": "image"})],
)
@torch.no_grad()
def test_nested_connectors_are_nested(connector, settings):
    built = make(connector, connector_config=settings, num_visual_tokens=36)
    built.apply(lambda module: [torch.nn.init.normal_(p, std=0.3) for p in module.parameters(recurse=False)])
    views = torch.randn(3, 36, 64)
    largest = built.reduce(views, 36)
    for m in (1, 4, 9):
        tokens = built.reduce(views, m)
        if connector == "resampler":
            torch.testing.assert_close(tokens, largest[:, :m], atol=1e-5, rtol=1e-5)
            continue
        side = round(m**0.5)
        for place in range(m):  # a naive mean over the finest tokens of the square
            rows = range(6 // side * (place // side), 6 // side * (place // side + 1))
            columns = range(6 // side * (place % side), 6 // side * (place % side + 1))
            mean = torch.stack([largest[:, 6 * row + column] for row in rows for column in columns]).mean(0)
            torch.testing.assert_close(tokens[:, place], mean, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_anchored_emits_its_anchors_first_and_depends_on_the_question():
    plain = make("anchored", connector_config={"anchor_grids": [2, 3]}, num_visual_tokens=20, fuse_question=False)
    told = make("anchored", connector_config={"anchor_grids": [2, 3]}, num_visual_tokens=20)
    for connector in (plain, told):
        connector.apply(lambda module: [torch.nn.init.normal_(p, std=0.3) for p in module.parameters(recurse=False)])
    views = torch.randn(2, 36, 64)
    mean = plain.projection(views.reshape(2, 2, 3, 2, 3, 64).mean((2, 4)).flatten(1, 2))
    for m in (4, 5, 8):
        torch.testing.assert_close(plain.reduce(views, m)[:, :4], mean, atol=1e-5, rtol=1e-5)
    words, is_word = torch.randn(2, 5, 48), torch.ones(2, 5, dtype=torch.bool)
    one, other = told.reduce(views, 12, words, is_word), told.reduce(views, 12, words.flip(1), is_word)
    assert torch.equal(one[:, :9], other[:, :9])
    assert (one[:, 9:] - other[:, 9:]).abs().max() > 1e-3
    padded = torch.cat([words, torch.randn(2, 3, 48)], dim=1)
    mask = torch.cat([is_word, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(told.reduce(views, 12, padded, mask), one, atol=1e-5, rtol=1e-5)

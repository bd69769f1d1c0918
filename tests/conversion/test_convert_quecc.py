"""A published QueCC checkpoint to a variant: every tensor in its place, answers as before, oddities refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from fusedvlm.conversion.convert import ConversionOptions, convert_published
from fusedvlm.conversion.published_quecc import NAMES, PARTS, quecc_names
from fusedvlm.tests import tiny


@pytest.fixture(scope="module")
def ours(backbones):
    return tiny.build_model(
        backbones, connector="quecc", fuser_config=None, num_visual_tokens=9, num_followup_visual_tokens=None,
        trained_num_visual_tokens=[9], max_local_views=0,
    )  # fmt: skip


def published_name(name: str) -> str | None:
    """Their name of one of our tensors; None for the attention projections, which they keep joined."""
    connector = "model.connector."
    if name.startswith("model.vision_tower.") or ".attention.q_" in name or ".attention.k_" in name:
        return None
    if ".attention.v_" in name:
        return None
    if not name.startswith(connector):
        return name.replace("model.language_model.", "model.")
    rest = name.removeprefix(connector)
    for number, layer in (("1.", "mlp.layers.0."), ("3.", "mlp.layers.1.")):
        if rest.startswith(layer):
            return f"model.mm_projector.{number}{rest.removeprefix(layer)}"
    theirs, mine = next((theirs, mine) for theirs, mine in NAMES if rest.startswith(mine))
    rest = rest.removeprefix(mine)
    if mine in ("query.", "key.", "value."):
        old, new = next((old, new) for old, new in PARTS if rest.startswith(new))
        rest = old + rest.removeprefix(new)
    return f"model.mm_projector.0.{theirs}{rest}"


@pytest.fixture
def published(ours, backbones, tmp_path):
    """The checkpoint as that code would have saved it: LLM and projector, no vision tower."""
    folder = tmp_path / "published"
    shutil.copytree(backbones / "llm", folder)
    state = ours.state_dict()
    found = {new: tensor.clone() for name, tensor in state.items() if (new := published_name(name)) is not None}
    for kind in ("weight", "bias"):
        joint = [state[f"model.connector.attention.{part}_proj.{kind}"] for part in "qkv"]
        found[f"model.mm_projector.0.clip_attn.in_proj_{kind}"] = torch.cat(joint)
    save_file(found, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llava_llama", "mm_vision_tower": str(backbones / "vision"),
               "mm_vision_token_compression_kernel_size": 2, "mm_vision_token_compression_stride": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_published_checkpoint_becomes_a_variant_that_answers_the_same(ours, published, tmp_path):
    report = convert_published(published, tmp_path / "variant")
    assert {old for old, _ in report.renamed} | set(report.used) == set(load_file(published / "model.safetensors"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant").eval()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (model.config.connector, model.config.num_visual_tokens, model.config.num_followup_visual_tokens) == (
        "quecc", 9, 9,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(tmp_path / "variant")
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.picture(1), text="What is in the image?")],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    with torch.no_grad():
        expected = ours.get_image_features(
            **{name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")},
            return_dict=True,
        ).pooler_output[0]
        found = model(**inputs).image_hidden_states[0]
    torch.testing.assert_close(found, expected)


def test_keys_that_belong_nowhere_and_towers_that_are_nowhere_are_named(published, tmp_path):
    state = load_file(published / "model.safetensors")
    save_file({**state, "model.mm_projector.0.q_proj.9.weight": torch.ones(1)}, published / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj\.9\.weight is no key of a published QueCC"):
        convert_published(published, tmp_path / "variant")
    save_file({**state, "model.mm_projector.2.weight": torch.ones(1)}, published / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 keys have no place.*mm_projector\.2\.weight"):
        convert_published(published, tmp_path / "variant")
    save_file({k: v for k, v in state.items() if "mm_projector" in k}, published / "model.safetensors")
    with pytest.raises(ValueError, match="without its language model"):
        convert_published(published, tmp_path / "variant")
    save_file(state, published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    del config["mm_vision_tower"]
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no vision tower and names none.*--vision-model"):
        convert_published(published, tmp_path / "variant", ConversionOptions())


def test_the_published_schema_is_known_key_by_key():
    from pathlib import Path

    schema = json.loads((Path(__file__).parents[1] / "oracle" / "quecc" / "quecc.json").read_text())
    names = schema["cases"]["real_size_state_dict"]
    ours = [new for name in names for new in quecc_names(name)]
    assert len(ours) == len(set(ours)) == len(names) + 4  # two joint tensors become three each

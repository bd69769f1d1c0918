"""The encoder: a variant without its LLM, of which only the embedding rows are read."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import GemmaConfig

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMEncoder, FusedVLMForConditionalGeneration
from fusedvlm.tests import tiny

MESSAGES = [tiny.user(tiny.picture(1), text="what?"), tiny.assistant("a cat"), tiny.user(tiny.picture(2), text="this?")]


def batch_of(processor):
    return processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_the_encoder_writes_the_prompt_that_the_llm_would_read(model, processor, tmp_path, merged):
    model.save_pretrained(tmp_path, merged=merged)
    encoder, report = FusedVLMEncoder.from_pretrained(tmp_path, output_loading_info=True)
    encoder.eval()
    assert not report["missing_keys"]
    inputs = batch_of(processor)
    ids, _ = inputs.pop("input_ids"), inputs.pop("attention_mask")
    embeds = encoder.embed_prompt(ids[0].tolist(), encoder.get_image_features(**inputs).pooler_output)
    expected = model.get_input_embeddings()(ids)[0]
    expected[ids[0] == model.config.image_token_id] = torch.cat(model.get_image_features(**inputs).pooler_output)
    assert torch.equal(embeds, expected)
    names = {name for name in encoder.state_dict() if name.startswith("language_model.")}
    assert names == {"language_model.embed_tokens.weight"}
    with pytest.raises(ValueError, match=r"placeholders, but 0 visual"):
        encoder.embed_prompt(ids[0].tolist(), [])


def test_only_the_embeddings_of_the_language_model_are_read(variant, monkeypatch):
    """The rest of its files may be damaged, or 13 GB."""
    from fusedvlm.modeling_fusedvlm import modeling_fusedvlm_loading as loading

    names = []

    class Watched:
        def __init__(self, name, part):
            self.name, self.part = name, part

        def __getattr__(self, attribute):
            return getattr(self.part, attribute)

        def __getitem__(self, index):
            names.append(self.name)
            return self.part[index]

    original = loading.text_keys_to_ours
    monkeypatch.setattr(
        loading, "text_keys_to_ours",
        lambda slices, config: {name: Watched(name, part) for name, part in original(slices, config).items()},
    )  # fmt: skip
    FusedVLMEncoder.from_pretrained(variant)
    assert set(names) == {"model.language_model.embed_tokens.weight"}


@torch.no_grad()
def test_embeddings_that_scale_stay_as_they_are(tmp_path, processor):
    llm = GemmaConfig(
        vocab_size=len(tiny.text_tokenizer()), hidden_size=48, intermediate_size=40, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tiny.save_backbones(tmp_path, llm_config=llm)
    model = tiny.build_model(tmp_path)
    model.save_pretrained(tmp_path / "variant")
    encoder = FusedVLMEncoder.from_pretrained(tmp_path / "variant")
    ids = torch.arange(9)
    assert torch.equal(encoder.get_input_embeddings()(ids), model.get_input_embeddings()(ids))


def test_a_connector_that_reads_with_the_llm_is_refused(backbones):
    model = tiny.build_model(
        backbones, connector="anchored", fuser_config=None, num_visual_tokens=None, trained_num_visual_tokens=None,
        num_followup_visual_tokens=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="--engine transformers"):
        FusedVLMEncoder(model.config)


def test_the_config_says_whether_the_llm_is_inside(model, variant, tmp_path):
    assert json.loads((variant / "config.json").read_text())["text_model_inside"] is False
    model.save_pretrained(tmp_path / "merged", merged=True)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["text_model_inside"] is True
    assert model.config.text_model_inside is None  # as it was
    # Nothing is read from where it was copied from, not even when a tensor is missing.
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert any(name.startswith("model.language_model.") for name in file.keys())  # noqa: SIM118
    (tmp_path / "merged" / "model.safetensors").write_bytes((variant / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="weights lack lm_head"):
        FusedVLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    # An older file does not say, and its tensors are looked at.
    config = json.loads((variant / "config.json").read_text())
    assert (
        FusedVLMConfig.from_dict({k: v for k, v in config.items() if k != "text_model_inside"}).text_model_inside
        is None
    )


def test_an_encoder_is_not_saved(variant, tmp_path):
    with pytest.raises(ValueError, match="part of a variant"):
        FusedVLMEncoder.from_pretrained(variant).save_pretrained(tmp_path)

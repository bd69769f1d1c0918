"""LLM families inside the model: same logits as the LLM alone, save by reference, load, generate, train a step."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from fusedvlm.tests import tiny

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "num_key_value_heads": 2}),
    "phi3": (Phi3Config, {}),
    "smollm3": (SmolLM3Config, {"num_key_value_heads": 2, "no_rope_layer_interval": 2}),
    "gemma": (GemmaConfig, {"head_dim": 12, "num_key_value_heads": 1}),
    # Caps its logits in the head; small caps so that it shows.
    "gemma2": (Gemma2Config, {"head_dim": 12, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 12, "sliding_window": 16}),
    # Divides its logits in the head.
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
}


def llm_config(family: str):
    config_class, fields = FAMILIES[family]
    return config_class(
        **{
            "vocab_size": len(tiny.text_tokenizer()),
            "hidden_size": tiny.LLM_WIDTH,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **fields,
        }
    )


@pytest.fixture(scope="module", params=FAMILIES)
def assembled(request, tmp_path_factory):
    """Folder, model and processor of one family."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    tiny.save_backbones(folder, llm_config=llm_config(request.param))
    model = tiny.build_model(folder)
    return folder, model, tiny.build_tiny_processor(model)


def encode(processor, answered: bool):
    messages = [tiny.user(tiny.picture(1), text="what is in the image?")]
    if answered:
        messages.append(tiny.assistant("a red cat"))
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not answered,
        return_assistant_tokens_mask=answered,
    )
    if answered:
        mask = torch.as_tensor(inputs.pop("assistant_masks")).bool()
        inputs["labels"] = inputs["input_ids"].masked_fill(~mask, -100)
    return inputs


@torch.no_grad()
def test_text_only_logits_are_the_llms_own(assembled):
    folder, model, processor = assembled
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm").eval()
    inputs = processor.tokenizer("a cat sleeps on the sofa", return_tensors="pt")
    expected = llm(**inputs).logits
    found = model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.05


def test_saved_by_reference_loads_and_generates_the_same(assembled, tmp_path):
    _, model, processor = assembled
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = encode(processor, answered=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(loaded.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), expected)


def test_a_training_step_moves_the_trained_parts_only(assembled):
    folder, _, processor = assembled
    model = tiny.build_model(folder).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = encode(processor, answered=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005)
    first = model(**inputs).loss
    first.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(**inputs).loss < first
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert not any(name.startswith(("model.language_model.", "lm_head.")) for name in moved)
    assert {name.split(".")[1] for name in moved} == {"vision_tower", "merger", "fuser", "projector"}

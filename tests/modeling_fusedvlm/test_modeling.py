"""The whole model: batches equal singles, generation in every mode, gradients, saving and loading."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageTextToText, TextIteratorStreamer

from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.tests import tiny

CONVERSATIONS = [
    [tiny.user(tiny.picture(1), text="what is in the image?")],
    [
        tiny.user(tiny.picture(2, 30, 60), text="describe the picture"),
        tiny.assistant("a red cat"),
        tiny.user(text="how many?"),
    ],
    [tiny.user(text="hello")],
    [
        tiny.user(tiny.picture(3), tiny.picture(4, 40, 40), text="same?"),
        tiny.assistant("no"),
        tiny.user(tiny.picture(5, 90, 30), text="and now?"),
    ],
]
COUNTS = [7, 12, 3, 1]


def encode(processor, conversations, counts=None, **kwargs):
    options = {"padding": True, **kwargs}
    if counts is not None:
        options["num_visual_tokens"] = counts
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=options,
    )


def new_tokens(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
    ],
    ids=["greedy", "beams", "beams returned", "no cache", "static cache", "chunked prefill"],
)
def test_mixed_batch_equals_one_by_one(model, processor, kwargs):
    if "prefill_chunk_size" in kwargs and tiny.OLDEST:
        pytest.skip("the oldest supported transformers cannot feed a prompt with images in chunks")
    batch = new_tokens(model, encode(processor, CONVERSATIONS, COUNTS), **kwargs)
    copies = kwargs.get("num_return_sequences", 1)
    singles = []
    for conversation, count in zip(CONVERSATIONS, COUNTS, strict=True):
        singles += new_tokens(model, encode(processor, [conversation], [count]), **kwargs)
    pad = processor.tokenizer.pad_token_id

    def strip(row):
        return [token for token in row if token != pad]

    assert [strip(row) for row in batch] == [strip(row) for row in singles]
    assert len(batch) == copies * len(CONVERSATIONS)


def test_images_matter(model, processor):
    logits = []
    for seed in (1, 2):
        with torch.no_grad():
            logits.append(model(**encode(processor, [[tiny.user(tiny.picture(seed), text="what")]])).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_sampling_reproduces_under_a_seed(model, processor):
    inputs = encode(processor, CONVERSATIONS[:2])

    def sample(seed):
        torch.manual_seed(seed)
        return new_tokens(model, inputs, do_sample=True, temperature=1.0)

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_streaming_yields_the_generated_text(model, processor):
    inputs = encode(processor, CONVERSATIONS[:1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=streamer)
    expected = processor.tokenizer.decode(new_tokens(model, inputs, max_new_tokens=6)[0], skip_special_tokens=True)
    assert "".join(streamer) == expected


@torch.no_grad()
def test_precomputed_visual_tokens_give_the_same_answer(model, processor):
    inputs = dict(encode(processor, CONVERSATIONS, COUNTS))
    expected = new_tokens(model, inputs)
    pixels = inputs.pop("pixel_values")
    views, _ = model.model.get_view_features(pixels)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    features = model.get_image_features(view_features=views, return_dict=True, **inputs)
    assert new_tokens(model, {**text, "mm_encoder_outputs": {"image": features}}) == expected


@torch.no_grad()
def test_padding_side_and_amount_do_not_matter(model, processor):
    single = model(**encode(processor, CONVERSATIONS[:1])).logits[0]
    for options in (
        {"padding": "max_length", "max_length": 300, "padding_side": "left"},
        {"padding": "max_length", "max_length": 280, "padding_side": "right"},
    ):
        inputs = encode(processor, CONVERSATIONS[:1], **options)
        logits = model(**inputs).logits[0][inputs["attention_mask"][0].bool()]
        torch.testing.assert_close(logits, single, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_prompt_length_does_not_depend_on_the_image(processor):
    lengths = {
        encode(processor, [[tiny.user(tiny.picture(0, w, h), text="what")]])["input_ids"].shape[1]
        for w, h in ((10, 10), (200, 20), (20, 200), (64, 48))
    }
    assert len(lengths) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_reaches_every_trained_parameter(backbones, processor, use_reentrant):
    model = tiny.build_model(backbones).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    inputs = encode(processor, CONVERSATIONS, [12, 12, 12, 12], padding_side="right")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    frozen, missing = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen.append(name)
        elif parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any():
            missing.append(name)
    assert missing == []
    assert frozen
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in frozen)


def test_checkpointing_gives_the_same_gradients(backbones, processor):
    inputs = encode(processor, CONVERSATIONS[:2], padding_side="right")
    grads = []
    for checkpointing in (False, True):
        model = tiny.build_model(backbones).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append(model.model.fuser.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_text_only_training_batch_has_zero_gradients_not_none(backbones, processor):
    model = tiny.build_model(backbones).train()
    inputs = encode(processor, [CONVERSATIONS[2]], padding_side="right")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@torch.no_grad()
def test_saved_by_reference_and_merged_load_to_the_same_logits(model, processor, tmp_path):
    inputs = encode(processor, CONVERSATIONS, COUNTS)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "reference")
    model.save_pretrained(tmp_path / "merged", merged=True)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("reference", "merged")}
    llm_bytes = 4 * sum(p.numel() for n, p in model.named_parameters() if not p.requires_grad)
    assert sizes["merged"] - sizes["reference"] >= llm_bytes
    for name in sizes:
        loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert torch.equal(loaded(**inputs).logits, expected)
        assert not any(p.requires_grad for n, p in loaded.named_parameters() if "language_model" in n)
        assert torch.equal(
            AutoModel.from_pretrained(tmp_path / name)(**inputs).last_hidden_state, model.model(**inputs)[0]
        )


def test_what_joined_the_language_model_later_is_not_saved_with_it(model, tmp_path):
    """Adapters and quantizers add tensors to the LLM that were not there when the model was made."""
    later = {"model.language_model.layers.0.self_attn.q_proj.absmax": torch.ones(3), "lm_head.scale": torch.ones(1)}
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), **later})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {name for name in model.state_dict() if not name.startswith(("model.language_model.", "lm_head."))}


def test_merged_copy_needs_no_language_model(backbones, tmp_path):
    model = tiny.build_model(backbones)
    model.config.text_model_name_or_path = "./nowhere"
    model.save_pretrained(tmp_path / "merged", merged=True)
    model.save_pretrained(tmp_path / "reference")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with pytest.raises(OSError, match=r"needs the language model .*nowhere"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "reference")


@pytest.mark.parametrize("reference", ["../llm", "./llm"])
def test_relative_reference_is_read_from_the_variants_folder(backbones, tmp_path, reference):
    model = tiny.build_model(backbones)
    model.config.text_model_name_or_path = reference
    model.save_pretrained(tmp_path / "variant")
    (tmp_path / "variant" / reference).symlink_to(backbones / "llm")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_resizing_embeddings_of_a_referenced_llm_is_refused(model):
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(1000)


@torch.no_grad()
def test_bf16_drift_is_small(variant, model, processor):
    half = AutoModelForImageTextToText.from_pretrained(variant, dtype=torch.bfloat16)
    inputs = encode(processor, CONVERSATIONS, COUNTS)
    real = inputs["attention_mask"].bool()
    exact, drifted = model(**inputs).logits[real], half(**inputs).logits[real].float()
    assert half.lm_head.weight.dtype == torch.bfloat16
    drift = (exact - drifted).abs().max() / exact.abs().max()
    assert 0 < drift < 0.2


def quantization(kind: str):
    if kind == "torchao int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory):
    """A variant whose LLM has widths that 4-bit kernels take."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("quantizable")
    config = LlamaConfig(
        vocab_size=len(tiny.text_tokenizer()), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.05, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tiny.save_backbones(folder, llm_config=config)
    model = tiny.build_model(folder)
    model.save_pretrained(folder / "variant")
    return folder / "variant", model


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4", "dictionary"])
@torch.no_grad()
def test_quantizing_touches_the_llm_only(quantizable, processor, tmp_path, kind):
    variant, model = quantizable
    quantized = FusedVLMForConditionalGeneration.from_pretrained(variant, quantization_config=quantization(kind))
    plain = dict(model.named_modules())
    changed = {
        name
        for name, module in quantized.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (type(module) is not type(plain[name]) or type(module.weight) is not type(plain[name].weight)
             or type(module.weight.data) is not type(plain[name].weight.data))
    }  # fmt: skip
    linears = {n for n, m in plain.items() if isinstance(m, torch.nn.Linear)}
    assert changed == {name for name in linears if name.startswith("model.language_model.")}
    inputs = encode(processor, CONVERSATIONS[:2])
    exact = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    likeness = torch.cosine_similarity(quantized(**inputs).logits[real].float(), exact[real], dim=-1).mean()
    assert 0.9 < likeness < 1
    # Saving writes the trained parts, bit for bit, and no claim to be quantized.
    quantized.save_pretrained(tmp_path)
    again = FusedVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, exact)


def test_stage_one_loads_into_stage_two_by_name(model, tmp_path):
    stage1 = tiny.build_contrastive_model(model)
    stage1.save_pretrained(tmp_path)
    stage2, report = FusedVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"model.projector.weight"}
    for name, tensor in stage1.model.state_dict().items():
        assert torch.equal(tensor, stage2.model.state_dict()[name]), name
    assert torch.equal(stage2.lm_head.weight, model.lm_head.weight)


def test_generation_settings_of_the_llm_are_kept_and_placeholders_suppressed(tmp_path):
    from transformers import GenerationConfig

    tiny.save_backbones(tmp_path)
    GenerationConfig(eos_token_id=[2, 77], temperature=0.5, do_sample=True).save_pretrained(tmp_path / "llm")
    tiny.build_model(tmp_path).save_pretrained(tmp_path / "variant")
    settings = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant").generation_config
    assert settings.eos_token_id == [2, 77]
    assert settings.temperature == 0.5
    assert settings.suppress_tokens == [3]

"""Different ways to compute the same thing: row order, attention backends, compilation, assisted generation, precision.

Nested queries, incremental fusion, batches against singles, padding, constant prompt length and seeds are in
`test_fusion.py` and `test_modeling.py`.
"""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompileConfig, set_seed

from fusedvlm.tests import tiny
from fusedvlm.tests.common import testers

CONVERSATIONS = [
    [tiny.user(tiny.picture(1), text="what is in the image?")],
    [
        tiny.user(tiny.picture(2, 30, 60), text="describe the picture"),
        tiny.assistant("a red cat"),
        tiny.user(text="how many?"),
    ],
    [tiny.user(tiny.picture(3), tiny.picture(4, 40, 40), text="same?")],
    [tiny.user(text="hello")],
]


def encode(processor, conversations, **kwargs):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, **kwargs},
    )


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_order_of_rows_does_not_matter(model, processor):
    order = [2, 0, 3, 1]
    inputs, shuffled = encode(processor, CONVERSATIONS), encode(processor, [CONVERSATIONS[k] for k in order])
    logits, mixed = model(**inputs).logits, model(**shuffled).logits
    for row, k in enumerate(order):
        real = inputs["attention_mask"][k].bool()
        torch.testing.assert_close(mixed[row][real], logits[k][real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
@torch.no_grad()
def test_attention_backends_agree_with_sdpa(variant, processor, backend):
    inputs = encode(processor, CONVERSATIONS)
    real = inputs["attention_mask"].bool()
    logits = {}
    for name in ("sdpa", backend):
        model = AutoModelForImageTextToText.from_pretrained(variant, attn_implementation=name)
        parts = (model.model.vision_tower, model.model.fuser, model.model.language_model)
        assert {part.config._attn_implementation for part in parts} == {name}
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex attention says that it is slow uncompiled; compiling takes longer
            logits[name] = model(**inputs).logits[real]
    scale = logits["sdpa"].abs().max()
    assert (logits[backend] - logits["sdpa"]).abs().max() <= 1e-4 * scale


@torch.no_grad()
def test_stage_one_backends_agree():
    config = testers.build_config(answer_config=testers.answer_config(), projection_dim=28)
    from fusedvlm.modeling_fusedvlm import FusedVLMForContrastiveLearning

    set_seed(0)
    model = FusedVLMForContrastiveLearning(config).eval()
    inputs = testers.build_contrastive_inputs()
    outputs = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        outputs[name] = model(**inputs, return_loss=True)
    for name in ("image_embeds", "answer_embeds", "loss"):
        torch.testing.assert_close(outputs["eager"][name], outputs["sdpa"][name], atol=1e-5, rtol=1e-5)


def test_compiled_generation_with_a_static_cache(model, processor):
    inputs = encode(processor, CONVERSATIONS[:2])
    expected = generate(model, inputs)
    # Not "inductor": graph capture is what a model can break, code generation is the compiler's own matter.
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True  # as transformers' own tests do where there is no accelerator
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = generate(copy.deepcopy(model), inputs, cache_implementation="static", compile_config=config)
    assert found == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_prefill_in_one_graph_is_refused_with_what_works(model, processor):
    """`torch.compile(model.forward, fullgraph=True)`, as guides have it: the counts of a batch are plain Python."""
    inputs = encode(processor, CONVERSATIONS[:2])
    expected = model(**inputs).logits
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile its parts, "):
        torch.compile(copy.deepcopy(model).forward, fullgraph=True, backend="eager")(**inputs)
    parts = copy.deepcopy(model)
    for part in (parts.model.vision_tower, parts.model.language_model):
        part.forward = torch.compile(part.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(parts(**inputs).logits, expected)
    whole = torch.compile(copy.deepcopy(model).forward, backend="eager")
    torch.testing.assert_close(whole(**inputs).logits, expected)


def test_generation_from_embeddings(model, processor):
    inputs = dict(encode(processor, CONVERSATIONS[:2]))
    expected = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=8, do_sample=False).tolist() == expected


def test_generation_continues_from_a_cache(model, processor):
    inputs = encode(processor, CONVERSATIONS[:2])
    whole = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    part = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    rest = model.generate(
        input_ids=part.sequences,
        attention_mask=mask,
        past_key_values=part.past_key_values,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(rest, whole)


def test_generation_returns_scores_states_and_attentions(backbones, processor):
    model = tiny.build_model(backbones)
    model.set_attn_implementation("eager")
    inputs = encode(processor, CONVERSATIONS[:2])
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    length = inputs["input_ids"].shape[1]
    layers = model.config.text_config.num_hidden_layers
    heads = model.config.text_config.num_attention_heads
    assert len(out.logits) == len(out.hidden_states) == len(out.attentions) == 4
    assert [states[0].shape for states in out.hidden_states] == [(2, length, 48), *[(2, 1, 48)] * 3]
    assert all(len(states) == layers + 1 for states in out.hidden_states)
    assert [step[0].shape for step in out.attentions] == [
        (2, heads, length, length),
        *[(2, heads, 1, length + k) for k in (1, 2, 3)],
    ]
    # The logits of step k are those of one pass over everything generated before it.
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    full = {**inputs, "input_ids": out.sequences[:, :-1], "attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        logits = model(**full).logits[:, length - 1 :]
    suppressed = model.config.image_token_id
    for step in range(4):
        torch.testing.assert_close(out.logits[step], logits[:, step], atol=2e-4, rtol=1e-4)
        assert (out.sequences[:, length + step] != suppressed).all()


def test_assisted_decoding_changes_nothing(model, backbones, processor):
    inputs = encode(processor, CONVERSATIONS[:1])
    expected = generate(model, inputs)
    assert generate(model, inputs, assistant_model=copy.deepcopy(model)) == expected
    text_only = AutoModelForCausalLM.from_pretrained(backbones / "llm")
    assert generate(model, inputs, assistant_model=text_only) == expected


def test_prompt_lookup_never_copies_placeholders(model, processor):
    inputs = encode(processor, CONVERSATIONS[:1])
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    expected = generate(model, inputs, max_new_tokens=16)
    assert generate(model, inputs, max_new_tokens=16, prompt_lookup_num_tokens=4) == expected


@torch.no_grad()
def test_drift_of_bf16_is_reported(variant, model, processor, record_property):
    """Relative to the largest logit of fp32, on random weights of a scale that makes logits sharp."""
    inputs = encode(processor, CONVERSATIONS)
    real = inputs["attention_mask"].bool()
    exact = model(**inputs).logits[real]
    half = AutoModelForImageTextToText.from_pretrained(variant, dtype=torch.bfloat16)
    drift = ((half(**inputs).logits[real].float() - exact).abs().max() / exact.abs().max()).item()
    record_property("bf16_drift", drift)
    print(f"bf16 drift of logits: {drift:.4f} of the largest")
    assert 0 < drift < 0.2
    # Answers that fp32 is sure about stay the same: where its margin exceeds twice the drift.
    top = exact.topk(2).values
    sure = (top[:, 0] - top[:, 1]) > 2 * drift * exact.abs().max()
    assert sure.any()
    assert torch.equal(exact[sure].argmax(-1), half(**inputs).logits[real][sure].argmax(-1))


def test_building_is_reproduced_by_a_seed(backbones, model):
    again, other = tiny.build_model(backbones, seed=0), tiny.build_model(backbones, seed=5)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert not torch.equal(other.model.projector.weight, model.model.projector.weight)

"""States from batches with a shared prefix cache against one plain forward pass per answer; reading of pairs; resuming."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    set_seed,
)

from fusedvlm.scaling.divergence.accumulate import StateFile, accumulate
from fusedvlm.scaling.divergence.branches import TextBranches
from fusedvlm.scaling.divergence.estimators import DivergenceStatistics
from fusedvlm.scaling.divergence.pairs import TextPair, read_pair, stream_rows
from fusedvlm.tests.tiny import text_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SIZES = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tokenizer(template=TEMPLATE):
    made = text_tokenizer()
    made.chat_template = template
    return made


def llama(**kwargs):
    set_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=256, **kwargs)
    return LlamaForCausalLM(config).eval()


def gpt2():
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=330, n_embd=32, n_layer=2, n_head=4, n_positions=256)).eval()


def mistral():
    set_seed(0)
    return MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, sliding_window=8)
    ).eval()


def pair(question, chosen, rejected, system="be brief"):
    return TextPair([{"role": "system", "content": system}, {"role": "user", "content": question}], chosen, rejected)


PAIRS = [
    pair("what is in the image?", "a red cat sleeps", "no, maybe yes and the lazy dog jumps over"),
    pair("how many objects are there in the picture?", "0123 yes", "a sofa"),
    pair("hello", "", "yes"),
    pair("describe", "the quick brown fox", "the quick lazy dog"),
]


def plain_states(model, tok, item, length):
    """One answer at a time, whole sequence, no cache, no padding."""
    prefix = tok.apply_chat_template(item.messages, tokenize=False, add_generation_prompt=True)
    states = []
    prefix_ids = tok(prefix, add_special_tokens=False)["input_ids"]
    for answer in (item.chosen, item.rejected):
        ids = tok(answer, add_special_tokens=False)["input_ids"][:length]
        with torch.no_grad():
            hidden = model(torch.tensor([prefix_ids + ids]), output_hidden_states=True).hidden_states[-1]
        states.append(hidden[0, len(prefix_ids) :].numpy())
    return states


@pytest.mark.parametrize("build", [llama, gpt2, mistral])
def test_batched_states_are_those_of_plain_forward_passes(build):
    model, tok = build(), tokenizer()
    found = TextBranches(model, tok, max_tokens=5).states(PAIRS)
    assert found[2] is None  # an empty answer
    for item, states in zip(PAIRS, found, strict=True):
        if states is None:
            continue
        length = min(
            5, *(len(tok(text, add_special_tokens=False)["input_ids"]) for text in (item.chosen, item.rejected))
        )
        for branch, expected in zip(states, plain_states(model, tok, item, length), strict=True):
            assert branch.shape == (length, 32)
            np.testing.assert_allclose(branch, expected, rtol=1e-4, atol=1e-5)


def test_prompt_is_computed_once_and_each_branch_once(monkeypatch):
    model = llama()
    lengths = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kw: lengths.append(kw["input_ids"].shape[1]) or forward(**kw))
    encoder = TextBranches(model, tokenizer(), max_tokens=4)
    encoder.states(PAIRS[:1])
    prefix, a, b = encoder.encode(PAIRS[0])
    assert lengths == [len(prefix), len(a), len(b)]
    assert len(a) == len(b) == 4


def test_half_precision_states_come_in_float32():
    found = TextBranches(llama().to(torch.bfloat16), tokenizer(), 6).states(PAIRS[:1])[0]
    assert found[0].dtype == np.float32
    exact = TextBranches(llama(), tokenizer(), 6).states(PAIRS[:1])[0]
    np.testing.assert_allclose(found[0], exact[0], atol=0.3)


def test_templates_without_system_role_or_none_at_all(capsys):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    encoder = TextBranches(llama(), tokenizer(strict), 4)
    prefix = encoder.tokenizer.decode(encoder.encode(PAIRS[0])[0])
    assert "[user] be brief\n\nwhat is in the image?" in prefix
    plain = TextBranches(llama(), tokenizer(None), 4)
    assert "be brief\n\nwhat is in the image?\n\n" in plain.tokenizer.decode(plain.encode(PAIRS[0])[0])
    assert "no system message" in capsys.readouterr().err


def test_prompts_that_fill_the_context_are_skipped(capsys):
    model = llama()
    long = pair("describe the picture in detail " * 60, "yes", "no")
    assert TextBranches(model, tokenizer(), 4).states([long]) == [None]
    assert "256 or more tokens" in capsys.readouterr().err


ROWS = [
    {"system": "s", "question": "q", "chosen": "c", "rejected": "r"},
    {"prompt": "q", "chosen": "c", "rejected": "r"},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "c"}], "rejected": "r"},
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
    },
]


@pytest.mark.parametrize("row", ROWS)
def test_every_preference_format_reads_alike(row):
    read = read_pair(row, 0, images=False)
    assert read.messages[-1] == {"role": "user", "content": "q"}
    assert (read.chosen, read.rejected) == ("c", "r")
    assert len(read.messages) == (2 if "system" in row else 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "chosen": "c"}, "Row 7: no rejected; its columns are question, chosen"),
        ({"chosen": "c", "rejected": "r"}, "Row 7: no prompt or question"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}],
                "rejected": ROWS[3]["rejected"],
            },
            "Row 7: no prompt, and chosen and rejected do not share",
        ),
        ({"question": "q", "chosen": [], "rejected": []}, "Row 7: chosen or rejected is an empty list"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_pair(row, 7, images=False)


def write_rows(tmp_path, count):
    words = [
        "a",
        "red",
        "cat",
        "sleeps",
        "on",
        "the",
        "sofa",
        "yes",
        "no",
        "maybe",
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
    ]
    generator = np.random.default_rng(0)

    def text(n):
        return " ".join(generator.choice(words, n))

    rows = [{"system": "s", "question": text(4), "chosen": text(3 + i % 4), "rejected": text(5)} for i in range(count)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_shards_partition_the_rows(tmp_path):
    path, rows = write_rows(tmp_path, 11)
    shards = [list(stream_rows(str(path), limit=10, shard=(rank, 3))) for rank in range(3)]
    assert sorted(number for shard in shards for number, _ in shard) == list(range(10))
    assert all(row == rows[number] for shard in shards for number, row in shard)
    assert list(stream_rows(str(path), limit=10, shard=(1, 3), skip=2)) == shards[1][2:]
    assert len(list(stream_rows(str(path)))) == 11


def test_missing_and_unknown_files_are_named(tmp_path):
    with pytest.raises(OSError, match="no such file"):
        list(stream_rows(str(tmp_path / "nothing.jsonl")))
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(ValueError, match=r"unknown type; files are \.jsonl"):
        list(stream_rows(str(tmp_path / "pairs.txt")))


def run(path, encoder, state, limit=10, stop_after=None):
    progress = state.load(DivergenceStatistics(6))
    rows = stream_rows(str(path), limit=limit, skip=progress.done)
    pairs = ((number, read_pair(row, number, images=False)) for number, row in rows)
    batches = accumulate(encoder, pairs, progress, state, batch_size=2, save_every=1)
    for _ in batches if stop_after is None else itertools.islice(batches, stop_after):
        pass
    return progress


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    path, _ = write_rows(tmp_path, 10)
    encoder = TextBranches(llama(), tokenizer(), 6)
    whole = run(path, encoder, StateFile(None, {}))
    state = StateFile(tmp_path / "run" / "state.npz", {"model": "tiny"})
    killed = run(path, encoder, state, stop_after=3)
    assert 0 < killed.done < 10
    resumed = run(path, encoder, state)
    assert resumed.done == whole.done == 10
    for name, values in whole.statistics.arrays().items():
        np.testing.assert_array_equal(resumed.statistics.arrays()[name], values, err_msg=name)
    with pytest.raises(ValueError, match="belongs to another measurement: model is 'tiny', not 'large'"):
        StateFile(state.path, {"model": "large"}).load(DivergenceStatistics(6))

"""The published model's numbers, from the published weights."""

import json

import numpy as np
import pytest
import torch

from fusedvlm.conversion.published_names import to_ours
from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_losses import contrastive_loss, identity_loss, zero_large_entries
from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMProcessor, default_chat_template
from fusedvlm.tests.modeling_fusedvlm import oracle

TOLERANCE = 1e-4  # of the output's scale
QUESTION, QUERY, EOS = 16, 256, 128


@pytest.fixture(scope="module")
def published():
    return oracle.model()


@pytest.fixture(scope="module")
def batch():
    """The oracle's batch of two samples in our packed layout."""
    case = oracle.arrays("b_fusion")
    questions, lengths = [], []
    for ids, types in zip(case["que_input_ids"], case["que_input_tps"], strict=True):
        current = []
        for token, kind in zip(ids.tolist(), types.tolist(), strict=True):
            if kind == QUESTION:
                current.append(token)
            elif kind == EOS:
                questions += current
                lengths.append(len(current))
                current = []
    return {
        "pixel_values": torch.tensor(oracle.arrays("a_vision")["pixel_values"]).float(),
        "image_num_views": torch.tensor([3, 5]),
        "question_input_ids": torch.tensor(questions),
        "question_lengths": torch.tensor(lengths),
        "question_turns": torch.tensor([0, 0, 1, 2]),
        "num_visual_tokens": torch.tensor([6, 6, 3, 3]),
        "image_num_questions": torch.tensor([1, 3]),
        "sample_num_images": torch.tensor([1, 1]),
    }


def assert_close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    theirs = torch.tensor(theirs).float()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@torch.no_grad()
def test_vision_tower_merge_and_newline(published):
    case = oracle.arrays("a_vision")
    tokens, outputs = published.model.get_view_features(torch.tensor(case["pixel_values"]).float())
    assert_close(outputs.last_hidden_state[:1], case["encoder_last_v0"])
    assert_close(tokens[:, :-1], case["merged_no_newline"])
    assert_close(tokens, case["tokens"])


@torch.no_grad()
def test_fusion_states(published, batch):
    fused, _ = published.model.fuse(**batch)
    case = oracle.arrays("b_fusion")
    assert_close(torch.cat(fused.segment_states), case["query_states"])
    assert_close(torch.stack([states[-1] for states in fused.segment_states]), case["eos_states"])


@torch.no_grad()
def test_language_model_logits_and_loss(published, batch):
    case = oracle.arrays("c_llm")
    ids = torch.tensor(case["input_ids"]).long()
    rows, columns = case["replaced_positions"].T
    ids[rows, columns] = oracle.IMAGE_TOKEN_ID
    mask = torch.tensor(case["attention_mask"]).long()
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = torch.tensor(case["shifted_labels"])
    output = published(input_ids=ids, attention_mask=mask, labels=labels, **batch)
    assert_close(torch.cat(output.image_hidden_states), case["fused_embeds_replaced"])
    real = mask.bool()
    assert_close(output.logits[real], case["logits"][real.numpy()])
    assert output.loss.item() == pytest.approx(float(case["loss"]), abs=1e-5)


def conversation(pieces: list[list[str]]) -> list[dict]:
    """Our messages for a published case, from its question and answer pieces."""
    messages = []
    for text, kind in pieces:
        text = text.removeprefix("[INST] ") if kind == "QUE" else text
        if kind == "QUE":
            shown = [] if messages else [{"type": "image"}]
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        elif kind == "ANS":
            answer = text.removesuffix(" </s>")
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


CHATS = [
    case
    for case in json.loads((oracle.FOLDER / "f_chat.json").read_text())["cases"]
    if case["template"] == "llama-2-vision" and "llm" in case
]


@pytest.fixture(scope="module")
def published_processor(published):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(oracle.FOLDER / "llm_tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    return FusedVLMProcessor(
        FusedVLMImageProcessor(size={"height": 84, "width": 84}),
        tokenizer,
        AutoTokenizer.from_pretrained(oracle.FOLDER / "clip_tokenizer"),
        image_token_id=oracle.IMAGE_TOKEN_ID,
        num_visual_tokens=6,
        num_followup_visual_tokens=3,
        chat_template=default_chat_template(None),
    )


@pytest.mark.parametrize("case", CHATS, ids=[case["conv"] for case in CHATS])
def test_prompt_token_layout(published_processor, case):
    text = published_processor.apply_chat_template(conversation(case["pieces"]), tokenize=False)
    inputs = published_processor.encode_prompts(text, return_assistant_tokens_mask=True)
    ids = inputs["input_ids"][0]
    theirs, types = case["llm"]["input_ids"], case["llm"]["input_tps"]
    expected = [oracle.IMAGE_TOKEN_ID if kind == QUERY else token for token, kind in zip(theirs, types, strict=True)]
    assert ids == expected
    # Labels: exactly the published answer pieces, the eos that ends them included.
    assert inputs["assistant_masks"][0] == [int(kind == 32) for kind in types]
    fusion = case["fusion"]
    questions = [t for t, kind in zip(fusion["input_ids"], fusion["input_tps"], strict=True) if kind == QUESTION]
    assert inputs["question_input_ids"] == questions
    runs = [count for kind, count in case["llm"]["runs"] if kind == "QED"]
    assert inputs["num_visual_tokens"] == runs


def test_system_message_replaces_the_default(published_processor):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]},
    ]
    text = published_processor.apply_chat_template(messages, tokenize=False)
    text = text.replace("<|literal|>", "").replace("<|/literal|>", "")
    assert "[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n<image>" in text
    assert "Vicuna" not in text
    assert "curious user" not in text


SCHEMA = json.loads((oracle.FOLDER / "key_schema_real_size.json").read_text())


def our_shapes(published: dict[str, list[int]], stage: str) -> dict[str, list[int]]:
    keys = to_ours(published, stage)
    assert not keys.dropped
    return {**{name: published[name] for name in keys.used}, **{new: published[old] for old, new in keys.renamed}}


def millions(model: torch.nn.Module, *prefixes: str) -> float:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes)) / 1e6


def test_state_dict_and_parameter_counts_at_the_papers_size():
    with torch.device("meta"):
        model = FusedVLMForConditionalGeneration(FusedVLMConfig())
    ours = {name: list(parameter.shape) for name, parameter in model.state_dict().items()}
    assert our_shapes(SCHEMA["vlm"], "generation") == ours
    # Millions of parameters, as in the paper's size table.
    assert millions(model, "model.vision_tower.", "model.merger.") == pytest.approx(312.9, abs=0.05)
    assert millions(model, "model.merger.conv") == pytest.approx(9.4, abs=0.05)
    assert millions(model, "model.fuser.") == pytest.approx(386.4, abs=0.05)
    assert millions(model, "model.fuser.embed_tokens") == pytest.approx(50.9, abs=0.05)
    assert millions(model, "model.projector.") == pytest.approx(4.19, abs=0.01)
    assert millions(model, "model.language_model.", "lm_head.") == pytest.approx(6738, abs=1)
    assert millions(model, "") == pytest.approx(7442, abs=1)


def test_stage_one_state_dict_and_parameter_count_at_the_papers_size():
    answer = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    config = FusedVLMConfig(answer_config={"model_type": "clip_text_model", "num_attention_heads": 12, **answer})
    with torch.device("meta"):
        model = FusedVLMForContrastiveLearning(config)
    ours = {name: list(parameter.shape) for name, parameter in model.state_dict().items()}
    assert our_shapes(SCHEMA["contrastive"], "contrastive") == ours
    assert sum(p.numel() for p in model.parameters()) == SCHEMA["param_counts"]["contrastive"]


@torch.no_grad()
def test_stage_one_loss_its_parts_and_embeddings():
    case = {name: torch.tensor(value) for name, value in oracle.arrays("d_contrastive").items()}
    names = ("image_num_views", "question_input_ids", "question_lengths", "num_visual_tokens")
    inputs = {name: case[name] for name in (*names, "answer_input_ids", "answer_attention_mask")}
    inputs.update(pixel_values=case["pixel_values"].float(), image_num_questions=[2, 1], return_loss=True)
    published = oracle.stage_one_model(published_answer_mask=True)(**inputs)
    for name in ("image_embeds", "answer_embeds", "logits_per_image"):
        assert_close(getattr(published, name), case[name].numpy())
    for name in ("loss", "contrastive_loss", "identity_loss"):
        assert getattr(published, name).item() == pytest.approx(case[name].item(), abs=1e-5)
    # Without the published mask answers are whole, and a pair's score does not depend on the rest of the batch.
    ours = oracle.stage_one_model()
    assert (ours(**inputs).answer_embeds - case["answer_embeds"]).abs().max() > 0.05
    inputs.update(
        answer_input_ids=case["answer_input_ids"][:1], answer_attention_mask=case["answer_attention_mask"][:1]
    )
    alone = ours.get_answer_embeds(inputs["answer_input_ids"], inputs["answer_attention_mask"])
    batch = ours.get_answer_embeds(case["answer_input_ids"], case["answer_attention_mask"])
    torch.testing.assert_close(batch[:1], alone)


def naive_identity_loss(states: torch.Tensor) -> torch.Tensor:
    unit = states / states.norm(dim=-1, keepdim=True)
    total = 0
    for i in range(len(unit)):
        for j in range(len(unit)):
            total = total + ((unit[i] * unit[j]).sum() - float(i == j)) ** 2
    return total / len(unit) ** 2


@pytest.mark.parametrize("count", [3, 29], ids=["fewer states than width", "more states than width"])
def test_identity_loss_against_a_double_loop(count):
    states = torch.randn(count, 11, dtype=torch.float64, requires_grad=True)
    twin = states.detach().clone().requires_grad_(True)
    fast, slow = identity_loss(states), naive_identity_loss(twin)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-9)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(states.grad, twin.grad, rtol=1e-9, atol=1e-12)


def test_contrastive_loss_against_a_loop():
    image = torch.nn.functional.normalize(torch.randn(5, 7), dim=-1)
    answer = torch.nn.functional.normalize(torch.randn(5, 7), dim=-1)
    logits = 3.0 * image @ answer.T
    rows = sum(-logits[k].log_softmax(0)[k] for k in range(5)) / 5
    columns = sum(-logits[:, k].log_softmax(0)[k] for k in range(5)) / 5
    assert contrastive_loss(image, answer, torch.tensor(3.0)).item() == pytest.approx(((rows + columns) / 2).item())


def test_published_answer_mask_drops_entries_beyond_one_deviation():
    projected = torch.randn(6, 9)
    kept = zero_large_entries(projected)
    mean, deviation = projected.mean(), projected.std()
    for value, result in zip(projected.flatten(), kept.flatten(), strict=True):
        assert result == (value if abs(value - mean) <= deviation else 0)
    assert 0 < (kept == 0).sum() < kept.numel()

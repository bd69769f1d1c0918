"""Counts against the published sizes, torch's FLOP counter on a live model, and a loop over a cache."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusedvlm.costs.counts import count_flops, kv_cache_bytes, read_shapes
from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.tests.tiny import OLDEST, build_model


@pytest.fixture(scope="module")
def paper():
    return read_shapes(FusedVLMConfig())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = build_model(tmp_path_factory.mktemp("counts"))
    model.set_attn_implementation("eager")  # every product visible to the counter
    return model


def test_parameters_of_the_papers_size(paper):
    millions = {name: count / 1e6 for name, count in paper.parameters.items()}
    assert millions == pytest.approx({"vision": 312.9, "fusion": 386.4, "projection": 4.194, "llm": 6738}, rel=1e-3)
    assert paper.total_parameters == pytest.approx(7442e6, rel=1e-4)


def test_flops_of_the_papers_size(paper):
    """One 640x480 image, 10 views: vision 3.8 TFLOP, fusion 1.1 to 1.7, LLM 0.5 to 10.5."""
    small, large = (count_flops(paper, m) for m in (1, 768))
    assert small.vision / 1e12 == pytest.approx(3.8, abs=0.05)
    assert small.fusion / 1e12 == pytest.approx(1.1, abs=0.05)
    assert large.fusion / 1e12 == pytest.approx(1.7, abs=0.05)
    assert small.prefill / 1e12 == pytest.approx(0.5, abs=0.05)
    assert large.prefill / 1e12 == pytest.approx(10.5, abs=0.1)


def test_parameters_add_up_to_the_live_model(tiny):
    assert read_shapes(tiny.config).total_parameters == sum(p.numel() for p in tiny.parameters())


@pytest.mark.parametrize("m", [1, 12])
def test_flops_are_those_torch_counts(tiny, m):
    views, question, text = 3, 4, 9
    config = tiny.config
    size = config.vision_config.image_size
    ids = torch.tensor([[5] * (text - 2) + [config.image_token_id] * m + [6, 7]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(views, 3, size, size),
        "image_num_views": torch.tensor([views]),
        "question_input_ids": torch.arange(question),
        "question_lengths": torch.tensor([question]),
        "question_turns": torch.tensor([0]),
        "num_visual_tokens": torch.tensor([m]),
        "image_num_questions": torch.tensor([1]),
        "sample_num_images": torch.tensor([1]),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = tiny(**inputs, use_cache=True, logits_to_keep=1)
    ours = count_flops(read_shapes(config), m, views, text, question, skip_masked=False)
    # Rotary angles by a product of matrices, which newer versions do without: one multiplication and addition each.
    angles = counter.get_total_flops() - ours.first_token if OLDEST else 0
    assert counter.get_total_flops() == ours.first_token + angles
    assert 0 <= angles < 1e-3 * ours.first_token
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny(input_ids=torch.tensor([[5]]), past_key_values=output.past_key_values, use_cache=True)
    assert counter.get_total_flops() == pytest.approx(ours.decode_step, rel=1e-3 if OLDEST else 0)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert kv_cache_bytes(read_shapes(config), text + m + 1, bytes_per_number=4) == cache


def test_skipped_masks_save_half_of_the_causal_attention(paper):
    full, half = (count_flops(paper, 768, skip_masked=skip) for skip in (False, True))
    assert full.vision == half.vision
    assert full.prefill - half.prefill == pytest.approx(2 * 32 * 4096 * (768 + 35) ** 2)


def test_impossible_counts_are_refused(paper):
    with pytest.raises(ValueError, match="num_visual_tokens=0"):
        count_flops(paper, 0)

"""Placeholders and visual tokens are counted sample by sample."""

import pytest
import torch

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_placeholders import scatter_visual_tokens
from fusedvlm.tests import tiny


def test_each_token_lands_on_its_placeholder():
    embeds = torch.zeros(2, 5, 3)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    tokens = [torch.full((2, 3), 1.0), torch.full((1, 3), 2.0), torch.full((1, 3), 3.0)]
    merged = scatter_visual_tokens(embeds, mask, tokens, [2, 2])
    assert merged[..., 0].tolist() == [[0, 1, 1, 0, 0], [2, 0, 0, 0, 3]]


@pytest.mark.parametrize(
    ("found", "expected", "sample"),
    [([3, 1], [2, 2], 0), ([2, 1], [2, 2], 1), ([1, 2], [2, 2], 0), ([0, 4], [2, 2], 0)],
)
def test_a_mismatch_names_the_sample_even_when_totals_agree(found, expected, sample):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for row, count in enumerate(found):
        mask[row, :count] = True
    tokens = [torch.ones(2, 3), torch.ones(2, 3)]
    message = rf"Sample {sample}: expected {expected[sample]} visual tokens .*, found {found[sample]} placeholders"
    with pytest.raises(ValueError, match=message):
        scatter_visual_tokens(torch.zeros(2, 5, 3), mask, tokens, expected)


def test_rows_repeated_by_beams_belong_to_their_sample():
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0:2, :2], mask[2:4, :1] = True, True
    tokens = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 3)]
    scatter_visual_tokens(torch.zeros(4, 3, 3), mask, tokens, [2, 1])
    with pytest.raises(ValueError, match="Sample 1: expected 2"):
        scatter_visual_tokens(torch.zeros(4, 3, 3), mask, tokens, [2, 2])


def test_model_refuses_a_batch_whose_counts_differ(model, processor):
    messages = [[tiny.user(tiny.picture(k), text="what is it")] for k in range(2)]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    inputs["num_visual_tokens"] = torch.tensor([6, 8])  # the total is still right
    with pytest.raises(ValueError, match=r"Sample 0: expected 6 .* found 7"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"Sample 0: expected 6 .* found 7"):
        model.generate(**inputs, max_new_tokens=1)


def test_placeholders_without_images_are_refused(model, processor):
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.picture(0), text="what")], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with pytest.raises((ValueError, RuntimeError), match="no images were given"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

"""Elastic m: dropping placeholders equals building the batch at that m; draws depend on seed and step alone."""

from collections import Counter

import pytest
import torch

from fusedvlm.tests import tiny
from fusedvlm.trainers import ConversationCollator, draw_num_visual_tokens, shrink_visual_tokens

SAMPLES = [
    {
        "images": [tiny.picture(1), tiny.picture(2, 30, 50)],
        "messages": [
            tiny.user(text="one?") | {"content": [{"type": "image"}, {"type": "text", "text": "one?"}]},
            tiny.assistant("yes"),
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two?"}]},
            tiny.assistant("no, it is not"),
        ],
    },
    {"images": [], "messages": [tiny.user(text="hello"), tiny.assistant("hi")]},
    {"images": [tiny.picture(3)], "messages": [tiny.user(text="three?"), tiny.assistant("a cat")]},
]


@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_shrinking_equals_building_at_that_m(processor, m):
    large = ConversationCollator(processor, num_visual_tokens=12, num_followup_visual_tokens=3)(SAMPLES)
    small = ConversationCollator(processor, num_visual_tokens=m, num_followup_visual_tokens=3)(SAMPLES)
    shrunk = shrink_visual_tokens(large, m, processor.image_token_id, processor.tokenizer.pad_token_id)
    assert set(shrunk) == set(small)
    for name in small:
        assert torch.equal(shrunk[name], small[name]), name


def test_text_only_batches_pass_through(processor):
    batch = ConversationCollator(processor)(SAMPLES[1:2])
    assert shrink_visual_tokens(batch, 1, processor.image_token_id, 0) is batch


def test_draws_repeat_and_follow_their_distribution():
    draws = [draw_num_visual_tokens([1, 4, 16], step, seed=7, probabilities=[0.5, 0.25, 0.25]) for step in range(2000)]
    assert draws == [draw_num_visual_tokens([1, 4, 16], step, 7, [0.5, 0.25, 0.25]) for step in range(2000)]
    assert draws != [draw_num_visual_tokens([1, 4, 16], step, 8, [0.5, 0.25, 0.25]) for step in range(2000)]
    counts = Counter(draws)
    # 6 standard deviations of a binomial share: false alarm below 1e-8
    for m, share in ((1, 0.5), (4, 0.25), (16, 0.25)):
        assert abs(counts[m] / 2000 - share) < 6 * (share * (1 - share) / 2000) ** 0.5

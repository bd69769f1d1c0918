"""Elastic m: one set of weights learns every number of visual tokens, because its queries are nested.

Batches are built at the largest m. Before each step the drawn m is applied by dropping the placeholders behind it,
which equals building the batch at that m, and needs no knowledge of steps inside data-loader workers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

PER_TOKEN = {"input_ids": 0, "attention_mask": 0, "labels": -100, "assistant_masks": 0}


def draw_num_visual_tokens(
    choices: Sequence[int], step: int, seed: int, probabilities: Sequence[float] | None = None
) -> int:
    """The m of a training step, the same on every rank and after every resume.

    It depends on nothing but (seed, step): no generator state has to be saved.
    """
    generator = np.random.default_rng([seed, step])
    return int(generator.choice(np.asarray(choices), p=probabilities))


def draw_per_sample(
    choices: Sequence[int],
    num_samples: int,
    step: int,
    seed: int,
    rank: int = 0,
    micro_batch: int = 0,
    probabilities: Sequence[float] | None = None,
) -> torch.Tensor:
    """(num_samples,) the m of every sample of a batch; depends on nothing but (seed, step, rank, micro-batch)."""
    generator = np.random.default_rng([seed, step, rank, micro_batch])
    return torch.from_numpy(generator.choice(np.asarray(choices), num_samples, p=probabilities))


def shrink_visual_tokens(
    batch: dict, num_visual_tokens: int | torch.Tensor, image_token_id: int, pad_token_id: int, per_view: bool = False
) -> dict:
    """The same batch with at most `num_visual_tokens` visual tokens for every segment.

    Args:
        batch: right-padded, as `ConversationCollator` builds it; `num_visual_tokens` (G,) image-major.
        num_visual_tokens: m of this step, or (B,) of each sample; segments that have fewer keep what they have.
        image_token_id, pad_token_id: ids in the LLM's vocabulary.
        per_view: whether the connector counts m by view.

    Returns:
        New dict; tensors that do not change are shared.
    """
    if "num_visual_tokens" not in batch:
        return batch
    old = batch["num_visual_tokens"]
    if isinstance(num_visual_tokens, torch.Tensor):
        num_visual_tokens = num_visual_tokens[sample_of_segment(batch)].to(old)
    else:
        num_visual_tokens = torch.full_like(old, num_visual_tokens)
    new = torch.minimum(old, num_visual_tokens)
    copies = copies_of_segment(batch) if per_view else torch.ones_like(old)
    keep_in_order = _placeholders_to_keep(batch, old * copies.to(old), new * copies.to(old))
    is_placeholder = batch["input_ids"] == image_token_id
    keep = torch.ones_like(is_placeholder)
    keep[is_placeholder] = keep_in_order.to(keep.device)
    keep &= batch["attention_mask"].bool()
    result = {**batch, "num_visual_tokens": new}
    for name, padding in PER_TOKEN.items():
        if name in batch:
            padding = pad_token_id if name == "input_ids" else padding
            rows = [values[kept] for values, kept in zip(batch[name], keep, strict=True)]
            result[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    return result


def sample_of_segment(batch: dict) -> torch.Tensor:
    """(G,) the number of the sample each segment belongs to."""
    samples = torch.arange(len(batch["sample_num_images"])).repeat_interleave(batch["sample_num_images"].cpu())
    return samples.repeat_interleave(batch["image_num_questions"].cpu())


def copies_of_segment(batch: dict) -> torch.Tensor:
    """(G,) the views of each segment's image: how often m stands in the prompt where m counts by view."""
    return batch["image_num_views"].cpu().repeat_interleave(batch["image_num_questions"].cpu())


def _placeholders_to_keep(batch: dict, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(placeholders of the batch in prompt order,) bool: the first `new` of every segment's `old`."""
    turns, samples = batch["question_turns"].cpu().numpy(), sample_of_segment(batch).numpy()
    order = np.lexsort((np.arange(len(turns)), turns, samples))  # prompts show a turn's images in image order
    old_counts, new_counts = old.tolist(), new.tolist()
    parts = [torch.arange(old_counts[g]) < new_counts[g] for g in order]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)

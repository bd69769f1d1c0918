"""Elastic m: one set of weights learns every number of visual tokens, because its queries are nested.

Batches are built at the largest m. Before each step the drawn m is applied by dropping the placeholders behind it,
which equals building the batch at that m, and needs no knowledge of steps inside data-loader workers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

RANGE = re.compile(r"(\d+)-(\d+)")
PER_TOKEN = {"input_ids": 0, "attention_mask": 0, "labels": -100, "assistant_masks": 0}


def log_uniform_shares(low: int, high: int) -> dict[int, float]:
    """{m: probability} of every integer from `low` to `high`; each doubling is drawn equally often.

    >>> {m: round(share, 2) for m, share in log_uniform_shares(1, 3).items()}
    {1: 0.5, 2: 0.29, 3: 0.21}

    Raises:
        ValueError: when the range is empty or begins below 1.
    """
    if not 1 <= low <= high:
        raise ValueError(f"A range of m must run upwards from at least 1, got {low}-{high}.")
    counts = np.arange(low, high + 1)
    weights = np.log((counts + 1) / counts) / np.log((high + 1) / low)
    return dict(zip(counts.tolist(), weights.tolist(), strict=True))


def count_shares(spec: int | str | Sequence[int | str]) -> dict[int, float]:
    """{m: probability} of what a recipe says.

    Args:
        spec: a count (32), a log-uniform range over every integer ("1-32"), or a list of them, each drawn equally
            often.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(spec, bool) or not isinstance(spec, int | str | list | tuple) or spec in ([], ()):
        raise ValueError(f"{spec!r} is no number of visual tokens: write 32, a range '1-32', or a list of such.")
    if isinstance(spec, list | tuple):
        shares: dict[int, float] = {}
        for part in spec:
            for m, share in count_shares(part).items():
                shares[m] = shares.get(m, 0.0) + share / len(spec)
        return dict(sorted(shares.items()))
    found = RANGE.fullmatch(str(spec))
    if found:
        return log_uniform_shares(int(found[1]), int(found[2]))
    if not str(spec).isdigit() or int(spec) < 1:
        raise ValueError(f"{spec!r} is no number of visual tokens: write 32, a range '1-32', or a list of such.")
    return {int(spec): 1.0}


def shares_from(shares: Mapping[int, float], minimum: int) -> dict[int, float]:
    """The shares of counts of at least `minimum`, which add up to one again."""
    kept = {m: share for m, share in shares.items() if m >= minimum}
    total = sum(kept.values())
    return {m: share / total for m, share in kept.items()}


def draw_from(shares: Mapping[int, float], *key: int) -> int:
    """One m; depends on nothing but the shares and the key, e.g. (seed, step, number of the source)."""
    return int(np.random.default_rng(key).choice(np.asarray(list(shares)), p=list(shares.values())))


def octave(m: int) -> str:
    """Name of the doubling m lies in, for logs of runs that draw every integer.

    >>> octave(1), octave(3), octave(24)
    ('1', '2_to_3', '16_to_31')
    """
    low = 1 << (m.bit_length() - 1)
    return str(low) if low == 1 else f"{low}_to_{2 * low - 1}"


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
    batch: dict,
    num_visual_tokens: int | torch.Tensor,
    image_token_id: int,
    pad_token_id: int,
    per_view: bool = False,
    num_followup_visual_tokens: int | None = None,
) -> dict[str, Any]:
    """The same batch with at most `num_visual_tokens` visual tokens for every segment.

    Args:
        batch: right-padded, as `ConversationCollator` builds it; `num_visual_tokens` (G,) image-major.
        num_visual_tokens: m of this step, or (B,) of each sample; segments that have fewer keep what they have.
        image_token_id, pad_token_id: ids in the LLM's vocabulary.
        per_view: whether the connector counts m by view.
        num_followup_visual_tokens: m' of this step, for every question about an image after its first; never more
            than m.

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
    if num_followup_visual_tokens is not None:
        new = torch.where(is_followup(batch).to(old.device), new.clamp(max=num_followup_visual_tokens), new)
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


def join_versions(versions: Sequence[dict], pad_token_id: int) -> dict[str, Any]:
    """One batch of several versions that differ in m alone: their prompts below one another, their images once.

    Args:
        versions: K batches as `shrink_visual_tokens` gives them, of the same samples.
        pad_token_id: id in the LLM's vocabulary.

    Returns:
        Prompts (K x B, L), version after version, and `num_visual_tokens` (K, G).
    """
    joined = dict(versions[0])
    for name, padding in PER_TOKEN.items():
        if name in joined:
            rows = [row for version in versions for row in version[name]]
            padding = pad_token_id if name == "input_ids" else padding
            joined[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    joined["num_visual_tokens"] = torch.stack([version["num_visual_tokens"] for version in versions])
    return joined


def sample_of_segment(batch: dict) -> torch.Tensor:
    """(G,) the number of the sample each segment belongs to."""
    samples = torch.arange(len(batch["sample_num_images"])).repeat_interleave(batch["sample_num_images"].cpu())
    return samples.repeat_interleave(batch["image_num_questions"].cpu())


def is_followup(batch: dict) -> torch.Tensor:
    """(G,) whether a segment's question is about an image that an earlier question was about."""
    counts = batch["image_num_questions"].cpu()
    place = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return place > 0


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

"""All numbers of visual tokens of one image and one question in one pass over a single fusion row.

The decoder is causal, so query i does not depend on how many queries follow it: the states of query 1 to m - 1 are the
same for every m. Only the eos reads where it stands. One row therefore serves them all, with an eos for every m behind:

    [view 1 .. view n][question][query 1 .. query M-1][eos of m_1][eos of m_2] .. [eos of M]

The eos of m has the position behind query m - 1 and a mask under which it sees the views, the question, the queries up
to m - 1 and itself. Nothing sees an eos.

Shape legend
    I   images     P   view tokens of the image with most     Q   question, queries and eos of the longest question
    C   width      G   segments: one question asked about one image     M   largest of the counts
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaModel

from .modeling_fusedvlm_rows import FusionPlan
from .modeling_fusedvlm_turns import (
    MASK_FORMS,
    TurnRows,
    keeps_cache,
    pad_views,
    read_repeated,
    read_rows,
    read_views,
    select_images,
)


def with_count(plan: FusionPlan, num_visual_tokens: int) -> FusionPlan:
    """The plan with the same m for every segment."""
    return replace(plan, segments=[replace(part, num_visual_tokens=num_visual_tokens) for part in plan.segments])


def check_counts(counts: Sequence[int]) -> list[int]:
    """Counts as a list. Raises `ValueError` when there are none, or for what is no whole number."""
    counts = list(counts)
    if not counts:
        raise ValueError("counts is empty: name at least one number of visual tokens, such as [1, 8, 256].")
    if any(isinstance(count, bool) or not isinstance(count, int) for count in counts):
        raise ValueError(f"counts={str(counts)[:80]} must be whole numbers.")
    return counts


def rounds_of_questions(plan: FusionPlan) -> list[list[int]]:
    """Segments in rounds of at most one per image: the k-th question of every image is in round k."""
    rounds: list[list[int]] = []
    asked = [0] * len(plan.views_per_image)
    for g, segment in enumerate(plan.segments):
        if asked[segment.image] == len(rounds):
            rounds.append([])
        rounds[asked[segment.image]].append(g)
        asked[segment.image] += 1
    return rounds


def forward_per_count(
    connector: Any, view_tokens: torch.Tensor, plan: FusionPlan, counts: list[int], *question: Any
) -> list[list[torch.Tensor]]:
    """Per segment, per count: what a connector gives for it, one count after the other over the same view tokens."""
    columns = [connector(view_tokens, with_count(plan, count), *question) for count in counts]
    return [list(row) for row in zip(*columns, strict=True)]


def read_every_count(
    fuser: LlamaModel, view_tokens: torch.Tensor, text_tokens: list[torch.Tensor], plan: FusionPlan, counts: list[int]
) -> list[list[torch.Tensor]]:
    """States at the queries and eos of every segment for every count; each question as the first about its image.

    Args:
        fuser: the fusion decoder.
        view_tokens: (V, T, C).
        text_tokens: per segment, (question tokens + M, C) embedded question, queries and eos of the largest count.
        plan: the batch.
        counts: every wanted m, in any order.

    Returns:
        Per segment, per count: (m, C).
    """
    form_mask = MASK_FORMS.get(fuser.config._attn_implementation)
    has_cache = keeps_cache(fuser)
    if form_mask is None and not has_cache:
        return _read_literally(fuser, view_tokens, text_tokens, plan, counts)
    views, is_view = pad_views(view_tokens, plan.views_per_image)
    cache = read_views(fuser, views, is_view) if has_cache else None
    states: list[list[torch.Tensor]] = [[] for _ in plan.segments]
    for chosen in rounds_of_questions(plan):
        images, texts = [plan.segments[g].image for g in chosen], [text_tokens[g] for g in chosen]
        seen = None if cache is None else select_images(cache, images)
        if form_mask is None:
            found = _read_eos_by_eos(fuser, seen, is_view[images].sum(1).tolist(), texts, counts)
        else:
            rows = build_count_rows(views[images], is_view[images], texts, counts)
            found = list(read_rows(fuser, rows, form_mask, seen))
        for row, g in enumerate(chosen):
            states[g] = split_counts(found[row], len(text_tokens[g]), counts)
    return states


def build_count_rows(
    views: torch.Tensor, is_view: torch.Tensor, text_tokens: list[torch.Tensor], counts: list[int]
) -> TurnRows:
    """Each image's question, queries and one eos per count, with the mask and positions under which they are alone.

    Args:
        views, is_view: (I, P, C) and (I, P), as in `TurnRows`.
        text_tokens: per image, (question tokens + M, C), the eos last.
        counts: every wanted m; the spans of the result stay empty, `split_counts` reads it.
    """
    device, largest = views.device, max(counts)
    texts = pad_sequence(
        [torch.cat([tokens[:-1], tokens[-1:].expand(len(counts), -1)]) for tokens in text_tokens], batch_first=True
    )
    size = texts.shape[1]
    places, limits = [], []  # of each text token: its place behind the views, and how many from the front it sees
    for tokens in text_tokens:
        front, padding = len(tokens) - 1, size - (len(tokens) - 1 + len(counts))
        behind = [front - (largest - count) for count in counts]
        places.append([*range(front), *behind, *[0] * padding])
        limits.append([*range(1, front + 1), *behind, *[0] * padding])
    keys = torch.arange(size, device=device)
    # Every token sees itself, padding too: none of its rows is without anything to see.
    is_own = (keys < torch.tensor(limits, device=device)[..., None]) | torch.eye(size, dtype=torch.bool, device=device)
    visible = torch.cat([is_view[:, None].expand(-1, size, -1), is_own], dim=2)
    positions = is_view.sum(1, keepdim=True) + torch.tensor(places, device=device)
    return TurnRows(views, is_view, texts, positions, visible, [])


def split_counts(states: torch.Tensor, length: int, counts: list[int]) -> list[torch.Tensor]:
    """Per count (m, C), from the states of a text of `length` = question tokens + M whose last token is repeated."""
    first = length - max(counts)
    return [
        torch.cat([states[first : first + count - 1], states[length - 1 + number : length + number]])
        for number, count in enumerate(counts)
    ]


def _read_eos_by_eos(
    fuser: LlamaModel, cache: Any, lengths: list[int], text_tokens: list[torch.Tensor], counts: list[int]
) -> list[torch.Tensor]:
    """Per image, states in the layout of `build_count_rows`, without any mask: as under flash attention.

    Question and queries continue the views; the eos of each count continues them, cut off behind its last query.
    """
    found = []
    for image, (length, tokens) in enumerate(zip(lengths, text_tokens, strict=True)):
        own = select_images(cache, [image], length)
        front = [tokens[:0]]
        if len(tokens) > 1:
            front = [fuser(inputs_embeds=tokens[None, :-1], past_key_values=own, use_cache=True).last_hidden_state[0]]
        ends = []
        for count in counts:
            behind = select_images(own, [0], length + len(tokens) - 1 - (max(counts) - count))
            outputs = fuser(inputs_embeds=tokens[None, -1:], past_key_values=behind, use_cache=True)
            ends.append(outputs.last_hidden_state[0])
        found.append(torch.cat([*front, *ends]))
    return found


def _read_literally(
    fuser: LlamaModel, view_tokens: torch.Tensor, text_tokens: list[torch.Tensor], plan: FusionPlan, counts: list[int]
) -> list[list[torch.Tensor]]:
    """A row of its own for every segment and count: neither cache nor mask are there."""
    columns = []
    for count in counts:
        cut = max(counts) - count
        texts = [torch.cat([tokens[: len(tokens) - 1 - cut], tokens[-1:]]) for tokens in text_tokens]
        columns.append(read_repeated(fuser, view_tokens, texts, with_count(plan, count)))
    return [list(row) for row in zip(*columns, strict=True)]

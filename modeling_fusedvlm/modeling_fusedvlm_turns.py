"""A fusion row per turn: every question about an image reads its views alone, and the views are computed once.

Asked for is one row for each question, as if it were the first (fusedvlm's docs/reference.md, "A row per turn"):

    [view 1 .. view n][question 1][query 1 .. query m-1][eos]
    [view 1 .. view n][question 2][query 1 .. query m'-1][eos] ...

The decoder is causal, so the views are the same in all of them. Here they stand once, with all questions behind:

    [view 1 .. view n][question 1][query 1 .. query m-1][eos][question 2][query 1 .. query m'-1][eos] ...

Positions begin again behind the views with every question, and a mask hides the questions from each other.

Shape legend
    I   images     P   view tokens of the image with most     Q   question and query tokens of the image with most
    C   width      G   segments: one question asked about one image
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaModel
from transformers.cache_utils import Cache, DynamicCache

from .modeling_fusedvlm_rows import FusionPlan, build_fusion_rows


def _allowed(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(I, q, k) bool as it is, for all heads."""
    return visible[:, None]


def _added(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(I, q, k) bool to what is added to the scores of all heads."""
    hidden = ~visible[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


# Attention implementations that take a mask of any form, and its form; the others (flash, flex) take none.
MASK_FORMS: dict[str, Callable[[torch.Tensor, torch.dtype], torch.Tensor]] = {"sdpa": _allowed, "eager": _added}


def has_later_turns(plan: FusionPlan) -> bool:
    """Whether any image is asked more than one question; without, a row per turn is a row per image."""
    return len({segment.image for segment in plan.segments}) < len(plan.segments)


@dataclass
class TurnRows:
    """Views and turns of each image, each padded on the right.

    `views` (I, P, C) and `is_view` (I, P); `texts` (I, Q, C), their `position_ids` (I, Q) and `visible` (I, Q, P + Q),
    True where a text token sees a view or text token; `spans[g]` = (image, start, stop) of segment g in `texts`.
    """

    views: torch.Tensor
    is_view: torch.Tensor
    texts: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor
    spans: list[tuple[int, int, int]]


def build_turn_rows(
    view_tokens: torch.Tensor, text_tokens: list[torch.Tensor], plan: FusionPlan, keep_questions: bool
) -> TurnRows:
    """Lay out the views and turns of every image, with a mask by which a turn sees the views and itself.

    Args:
        view_tokens: (V, T, C).
        text_tokens: per segment, (question tokens + m_g, C) embedded question and queries.
        plan: the batch.
        keep_questions: whether `text_tokens` hold the question in front of the queries.
    """
    device = view_tokens.device
    views, is_view = pad_views(view_tokens, plan.views_per_image)
    parts: list[list[torch.Tensor]] = [[view_tokens.new_zeros(0, view_tokens.shape[-1])] for _ in views]
    turns: list[list[int]] = [[] for _ in views]  # of each text token: which turn it belongs to
    places: list[list[int]] = [[] for _ in views]  # and its place behind the views
    spans = []
    for segment, tokens in zip(plan.segments, text_tokens, strict=True):
        image, start = segment.image, len(turns[segment.image])
        turns[image] += [len(parts[image])] * len(tokens)
        places[image] += range(len(tokens))
        parts[image].append(tokens)
        skipped = segment.num_question_tokens if keep_questions else 0
        spans.append((image, start + skipped, len(turns[image])))
    texts = pad_sequence([torch.cat(part) for part in parts], batch_first=True)
    size = texts.shape[1]
    turn = torch.tensor([numbers + [0] * (size - len(numbers)) for numbers in turns], device=device)
    place = torch.tensor([numbers + [0] * (size - len(numbers)) for numbers in places], device=device)
    # Padding is turn 0: it sees views and padding, nobody sees it, and none of its rows is without anything to see.
    is_own = (turn[:, :, None] == turn[:, None]) & torch.ones(size, size, dtype=torch.bool, device=device).tril()
    visible = torch.cat([is_view[:, None].expand(-1, size, -1), is_own], dim=2)
    return TurnRows(views, is_view, texts, is_view.sum(1, keepdim=True) + place, visible, spans)


def pad_views(view_tokens: torch.Tensor, views_per_image: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, T, C) as (I, P, C), each image's views behind one another, padded on the right; and (I, P) what is there."""
    views = pad_sequence([part.flatten(0, 1) for part in view_tokens.split(views_per_image)], batch_first=True)
    lengths = torch.tensor(views_per_image, device=views.device) * view_tokens.shape[1]
    return views, torch.arange(views.shape[1], device=views.device)[None] < lengths[:, None]


def read_turns(
    fuser: LlamaModel,
    view_tokens: torch.Tensor,
    text_tokens: list[torch.Tensor],
    plan: FusionPlan,
    keep_questions: bool,
) -> list[torch.Tensor]:
    """(m_g, C) states at the queries and eos of every segment, each on a row of its own.

    Arguments as in `build_turn_rows`. Three ways to one result (to rounding): the views fill a key-value cache, and all
    turns continue it at once under a mask; where layers are checkpointed, and keep no cache, one pass over views and
    turns under that mask; without masks, as under flash attention, every turn continues a copy of its image's cache.
    """
    form_mask = MASK_FORMS.get(fuser.config._attn_implementation)
    has_cache = keeps_cache(fuser)
    if form_mask is None:
        read = _read_from_copies if has_cache else read_repeated
        return read(fuser, view_tokens, text_tokens, plan)
    rows = build_turn_rows(view_tokens, text_tokens, plan, keep_questions)
    cache = read_views(fuser, rows.views, rows.is_view) if has_cache else None
    states = read_rows(fuser, rows, form_mask, cache)
    return [states[image, start:stop] for image, start, stop in rows.spans]


def keeps_cache(fuser: LlamaModel) -> bool:
    """Whether the decoder fills key-value caches: layers that are checkpointed in training do not."""
    # Asked of the layers themselves: the model's property is named differently from version to version.
    is_checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in fuser.modules())
    return not (fuser.training and is_checkpointed)


def read_rows(
    fuser: LlamaModel, rows: TurnRows, form_mask: Callable[..., torch.Tensor], cache: Cache | None
) -> torch.Tensor:
    """(I, Q, C) states of the texts of `rows`, behind a cache of their views or, where there is none, in one pass."""
    return _read_in_one_pass(fuser, rows, form_mask) if cache is None else _read_behind(fuser, rows, form_mask, cache)


def _read_behind(
    fuser: LlamaModel, rows: TurnRows, form_mask: Callable[..., torch.Tensor], cache: Cache
) -> torch.Tensor:
    """(I, Q, C): all turns behind the views; the causal part needed no mask, which is what makes it cheap."""
    return fuser(
        inputs_embeds=rows.texts,
        attention_mask=form_mask(rows.visible, rows.texts.dtype),
        position_ids=rows.position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def _read_in_one_pass(fuser: LlamaModel, rows: TurnRows, form_mask: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(I, Q, C): one row per image under the whole mask."""
    images, length = rows.views.shape[:2]
    positions = torch.arange(length, device=rows.views.device).expand(images, -1)
    # Views are padded behind, so that no view sees padding; padding sees views, and is not seen.
    causal = torch.ones(length, length, dtype=torch.bool, device=rows.views.device).tril().expand(images, -1, -1)
    hidden = torch.zeros(1, dtype=torch.bool, device=rows.views.device).expand(images, length, rows.texts.shape[1])
    visible = torch.cat([torch.cat([causal, hidden], dim=2), rows.visible], dim=1)
    states = fuser(
        inputs_embeds=torch.cat([rows.views, rows.texts], dim=1),
        attention_mask=form_mask(visible, rows.views.dtype),
        position_ids=torch.cat([positions, rows.position_ids], dim=1),
        use_cache=False,
    ).last_hidden_state
    return states[:, length:]


def _read_from_copies(
    fuser: LlamaModel, view_tokens: torch.Tensor, text_tokens: list[torch.Tensor], plan: FusionPlan
) -> list[torch.Tensor]:
    """Per segment (m_g, C): rows of text, each behind its image's keys and values, with masks of padding alone."""
    rows = build_fusion_rows(view_tokens, [], replace(plan, segments=[]), keep_questions=False)
    is_view = rows.attention_mask.bool()
    cache = read_views(fuser, rows.embeds, is_view)
    images = torch.tensor([segment.image for segment in plan.segments])  # here: layers may lie on several devices
    cache.batch_select_indices(images)
    texts = pad_sequence(text_tokens, batch_first=True)
    place = torch.arange(texts.shape[1], device=texts.device)
    lengths = torch.tensor([len(tokens) for tokens in text_tokens], device=texts.device)
    states = fuser(
        inputs_embeds=texts,
        attention_mask=torch.cat([is_view[images], place[None] < lengths[:, None]], dim=1).long(),
        position_ids=is_view.sum(-1)[images][:, None] + place,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return [
        row[len(tokens) - segment.num_visual_tokens : len(tokens)]
        for row, tokens, segment in zip(states, text_tokens, plan.segments, strict=True)
    ]


def read_repeated(
    fuser: LlamaModel, view_tokens: torch.Tensor, text_tokens: list[torch.Tensor], plan: FusionPlan
) -> list[torch.Tensor]:
    """Per segment (m_g, C): literally one row per turn, views repeated."""
    views = view_tokens.split(plan.views_per_image)
    repeated = [views[segment.image] for segment in plan.segments]
    segments = [replace(segment, image=row) for row, segment in enumerate(plan.segments)]
    alone = FusionPlan([len(part) for part in repeated], segments, plan.num_samples)
    rows = build_fusion_rows(torch.cat(repeated), text_tokens, alone, keep_questions=False)
    states = fuser(inputs_embeds=rows.embeds, attention_mask=rows.attention_mask, use_cache=False).last_hidden_state
    return [
        states[row, stop - segment.num_visual_tokens : stop]
        for (row, _, stop), segment in zip(rows.spans, plan.segments, strict=True)
    ]


def read_views(fuser: LlamaModel, views: torch.Tensor, is_view: torch.Tensor | None = None) -> Cache:
    """Key-value cache of (I, P, C) view tokens, of which `is_view` (I, P) are there; all by default."""
    cache = DynamicCache(config=fuser.config)
    mask = None if is_view is None else is_view.long()
    fuser(inputs_embeds=views, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


def share_cache(cache: Cache) -> Cache:
    """A cache that begins with the same keys and values and can be extended by itself; no tensor is copied.

    Extending a `DynamicCache` joins tensors into new ones, so the shared ones stay as they are.
    """
    shared = copy.copy(cache)
    shared.layers = [copy.copy(layer) for layer in cache.layers]
    return shared


def select_images(cache: Cache, images: list[int], length: int | None = None, own: bool = False) -> Cache:
    """A cache of some images and their first `length` positions, all by default; copied only where it must be.

    The cache itself stays as it is, and so do its tensors. With `own` the memory of one image among several is its own,
    so that it is free again when that image's cache is dropped.
    """
    shared = share_cache(cache)
    for layer in shared.layers:
        held: Any = layer
        if images != list(range(len(held.keys))):
            # One image is a slice, several need a copy.
            which: Any = slice(images[0], images[0] + 1) if len(images) == 1 else torch.tensor(images)
            held.keys, held.values = held.keys[which, :, :length], held.values[which, :, :length]
            if len(images) == 1 and own:
                held.keys, held.values = held.keys.clone(), held.values.clone()
        else:
            held.keys, held.values = held.keys[:, :, :length], held.values[:, :, :length]
    return shared


def continue_caches(
    fuser: LlamaModel, caches: list[Cache], text_tokens: list[torch.Tensor], extend: bool
) -> list[torch.Tensor]:
    """Per cache, states (tokens, C) of the text behind it; caches of equal length are continued together, unmasked.

    Args:
        fuser: the fusion decoder.
        caches: of one image each.
        text_tokens: per cache, (tokens, C).
        extend: whether each cache has its text behind it afterwards; else they stay as they are.
    """
    lengths = [cache.get_seq_length() for cache in caches]
    states: dict[int, torch.Tensor] = {}
    for length in sorted(set(lengths)):
        chosen = [number for number, own in enumerate(lengths) if own == length]
        together = join_caches([caches[number] for number in chosen])
        # Padding stands behind the text, where a causal decoder does not look.
        texts = pad_sequence([text_tokens[number] for number in chosen], batch_first=True)
        outputs = fuser(inputs_embeds=texts, past_key_values=together, use_cache=True).last_hidden_state
        for row, number in enumerate(chosen):
            states[number] = outputs[row, : len(text_tokens[number])]
            if extend:
                stop = length + len(text_tokens[number])
                caches[number].layers = select_images(together, [row], stop, own=True).layers
    return [states[number] for number in range(len(caches))]


def join_caches(caches: list[Cache]) -> Cache:
    """A cache of several images of equal length, from caches of one or more each, which stay as they are."""
    joined = share_cache(caches[0])
    if len(caches) > 1:
        for place, layer in enumerate(joined.layers):
            held: Any = layer
            parts: list[Any] = [cache.layers[place] for cache in caches]
            held.keys = torch.cat([part.keys for part in parts])
            held.values = torch.cat([part.values for part in parts])
    return joined

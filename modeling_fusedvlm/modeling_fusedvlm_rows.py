"""Fusion rows: which views, question and queries the fusion decoder reads together, and where its answer stands.

Shape legend
    V   views of all images of the batch          T   tokens of one view after merge + newline
    C   width of vision tower and fusion decoder
    I   images                                    G   segments: one question asked about one image
    m_g visual tokens of segment g

One fusion row per image (fusedvlm's docs/reference.md, "Fusion rows"):

    [view 1 .. view n][question 1][query 1 .. query m-1][eos][question 2][query 1 .. query m'-1][eos] ...

The decoder is causal, so a query never sees what comes after it: the states of segment 1 do not depend on how many
questions follow, and query i does not depend on how many queries follow it. Here a later question reads the earlier
ones; `modeling_fusedvlm_turns.py` gives every question a row of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

# Rows share a pass while padding is at most this part of what they hold, or at most so many tokens.
BUCKET_SLACK, BUCKET_TOKENS = 0.1, 64

Read = TypeVar("Read")


@dataclass
class FusionSegment:
    """One question asked about one image, as plain numbers.

    `turn` is the user turn inside the conversation, `sample` the conversation inside the batch; `num_visual_tokens` is
    m, which stands in the prompt `copies` times: once, or once per view where a connector counts by view.
    """

    image: int
    turn: int
    sample: int
    num_question_tokens: int
    num_visual_tokens: int
    copies: int = 1

    @property
    def num_placeholders(self) -> int:
        """Visual tokens of the segment in the LLM's prompt."""
        return self.num_visual_tokens * self.copies


@dataclass
class FusionPlan:
    """Everything about a batch of fusion rows that is not a tensor on the device."""

    views_per_image: list[int]
    segments: list[FusionSegment]  # image-major, then by turn
    num_samples: int

    def language_order(self) -> list[int]:
        """Order in which the segments stand in the LLM's prompts: by sample, turn, image."""
        return sorted(
            range(len(self.segments)),
            key=lambda g: (self.segments[g].sample, self.segments[g].turn, self.segments[g].image),
        )

    def segments_per_sample(self) -> list[list[int]]:
        """Segments of each conversation that has images, in prompt order."""
        groups: dict[int, list[int]] = {}
        for g in self.language_order():
            groups.setdefault(self.segments[g].sample, []).append(g)
        return list(groups.values())

    def visual_tokens_per_sample(self) -> list[int]:
        """Visual tokens each conversation of the batch must have placeholders for."""
        counts = [0] * self.num_samples
        for segment in self.segments:
            counts[segment.sample] += segment.num_placeholders
        return counts

    def of_images(self, images: list[int]) -> tuple["FusionPlan", list[int]]:
        """The plan of some images alone, numbered in the order given, and which segments of this plan it has."""
        number = {image: place for place, image in enumerate(images)}
        chosen = [g for image in images for g, segment in enumerate(self.segments) if segment.image == image]
        segments = [replace(self.segments[g], image=number[self.segments[g].image]) for g in chosen]
        return replace(
            self, views_per_image=[self.views_per_image[image] for image in images], segments=segments
        ), chosen


def to_list(values: torch.Tensor | Sequence[int] | None) -> list[int] | None:
    """Host copy of a 1-D integer tensor or sequence; None stays None."""
    if values is None:
        return None
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


def check_total(name: str, values: list[int], expected: int, what: str) -> None:
    """Raise `ValueError` when the packed counts `values` do not add up to `expected` things."""
    if sum(values) != expected:
        raise ValueError(f"{name}={values} adds up to {sum(values)}, but the batch has {expected} {what}.")


@torch.compiler.disable(
    reason="FusedVLM counts images, questions and views of a batch in Python, so a prefill is no single graph. Compile "
    "its parts, model.model.vision_tower and model.model.language_model, or forward without fullgraph."
)
def build_fusion_plan(
    num_views: int,
    default_num_visual_tokens: int,
    image_num_views: torch.Tensor | Sequence[int] | None = None,
    question_lengths: torch.Tensor | Sequence[int] | None = None,
    question_turns: torch.Tensor | Sequence[int] | None = None,
    num_visual_tokens: torch.Tensor | Sequence[int] | int | None = None,
    image_num_questions: torch.Tensor | Sequence[int] | None = None,
    sample_num_images: torch.Tensor | Sequence[int] | None = None,
    per_view: bool = False,
) -> FusionPlan:
    """Read the packed layout and check that its counts agree.

    Missing counts mean the plainest case: every view is an image of its own, every image belongs to a sample of its
    own and is asked one question (of length zero when `question_lengths` is missing too). With `per_view` a segment's
    m counts the tokens of each view of its image.

    Raises:
        ValueError: naming the two counts that disagree.
    """
    views_per_image = to_list(image_num_views) or [1] * num_views
    check_total("image_num_views", views_per_image, num_views, "views")
    num_images = len(views_per_image)

    questions_per_image = to_list(image_num_questions) or [1] * num_images
    if len(questions_per_image) != num_images:
        raise ValueError(f"image_num_questions has {len(questions_per_image)} entries for {num_images} images.")
    num_segments = sum(questions_per_image)

    images_per_sample = to_list(sample_num_images)
    if images_per_sample is None:
        images_per_sample = [1] * num_images
    check_total("sample_num_images", images_per_sample, num_images, "images")

    lengths = to_list(question_lengths) or [0] * num_segments
    turns = to_list(question_turns) or [turn for count in questions_per_image for turn in range(count)]
    if num_visual_tokens is None or isinstance(num_visual_tokens, (int, float)):
        counts = [default_num_visual_tokens if num_visual_tokens is None else num_visual_tokens] * num_segments
    else:
        counts = list(to_list(num_visual_tokens) or [])
    if any(isinstance(count, bool) or not isinstance(count, int) for count in counts):
        raise ValueError(f"num_visual_tokens={str(counts)[:80]} must be whole numbers.")
    for name, values in (("question_lengths", lengths), ("question_turns", turns), ("num_visual_tokens", counts)):
        if len(values) != num_segments:
            raise ValueError(f"{name} has {len(values)} entries for {num_segments} questions.")

    image_of = [image for image, count in enumerate(questions_per_image) for _ in range(count)]
    sample_of = [sample for sample, count in enumerate(images_per_sample) for _ in range(count)]
    segments = [
        FusionSegment(image, turn, sample_of[image], length, count, views_per_image[image] if per_view else 1)
        for image, turn, length, count in zip(image_of, turns, lengths, counts, strict=True)
    ]
    return FusionPlan(views_per_image, segments, len(images_per_sample))


def query_token_ids(num_visual_tokens: int, first_query_token_id: int, eos_token_id: int, distinct: bool) -> list[int]:
    """Rows of the fusion embedding table for one group of queries: m - 1 queries, then the eos.

    >>> query_token_ids(4, 320, 319, distinct=True)
    [320, 321, 322, 319]
    """
    queries = num_visual_tokens - 1
    rows = range(first_query_token_id, first_query_token_id + queries) if distinct else [eos_token_id] * queries
    return [*rows, eos_token_id]


@dataclass
class FusionRows:
    """Padded input of the fusion decoder and where to read its output.

    `embeds` (I, L, C) zero-padded on the right; `attention_mask` (I, L); `spans[g]` = (row, start, stop) of segment g.
    """

    embeds: torch.Tensor
    attention_mask: torch.Tensor
    spans: list[tuple[int, int, int]]


def build_fusion_rows(
    view_tokens: torch.Tensor, text_tokens: list[torch.Tensor], plan: FusionPlan, keep_questions: bool
) -> FusionRows:
    """Join views and text of each image and pad on the right.

    Args:
        view_tokens: (V, T, C).
        text_tokens: per segment, (question tokens + m_g, C) embedded question and queries.
        plan: the batch.
        keep_questions: whether `text_tokens` hold the question in front of the queries.
    """
    rows = [views.flatten(0, 1) for views in view_tokens.split(plan.views_per_image)]
    parts: list[list[torch.Tensor]] = [[row] for row in rows]
    ends = [row.shape[0] for row in rows]
    spans = []
    for segment, tokens in zip(plan.segments, text_tokens, strict=True):
        start = ends[segment.image] + (segment.num_question_tokens if keep_questions else 0)
        ends[segment.image] += tokens.shape[0]
        spans.append((segment.image, start, ends[segment.image]))
        parts[segment.image].append(tokens)

    embeds = pad_sequence([torch.cat(row) for row in parts], batch_first=True)
    lengths = torch.tensor(ends, device=embeds.device)
    positions = torch.arange(embeds.shape[1], device=embeds.device)
    return FusionRows(embeds, (positions[None] < lengths[:, None]).long(), spans)


def bucket_rows(lengths: list[int]) -> list[list[int]]:
    """Rows that are read together, so that little padding is: rows of one bucket have nearly the same length.

    >>> bucket_rows([1500, 300, 310, 305])
    [[0], [2, 3, 1]]
    """
    buckets: list[list[int]] = []
    longest = held = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size = len(buckets[-1]) + 1 if buckets else 0
        if buckets and longest * size - held - lengths[row] <= max(BUCKET_TOKENS, BUCKET_SLACK * (held + lengths[row])):
            buckets[-1].append(row)
            held += lengths[row]
        else:
            buckets.append([row])
            longest = held = lengths[row]
    return buckets


def read_in_buckets(
    read: Callable[[torch.Tensor, list[torch.Tensor], FusionPlan], list[Read]],
    view_tokens: torch.Tensor,
    text_tokens: list[torch.Tensor],
    plan: FusionPlan,
) -> list[Read]:
    """What `read` gives for every segment, images of unlike lengths apart: padding would be computed and thrown away.

    In one pass where several processes work together: with sharded weights all must call the decoder equally often.

    Args:
        read: function of view tokens (V, T, C), text tokens of every segment and a plan, as `build_fusion_rows` takes.
        view_tokens, text_tokens, plan: the batch.
    """
    lengths = [views * view_tokens.shape[1] for views in plan.views_per_image]
    for segment, tokens in zip(plan.segments, text_tokens, strict=True):
        lengths[segment.image] += len(tokens)
    buckets = [list(range(len(lengths)))] if _has_company() else bucket_rows(lengths)
    if len(buckets) == 1:
        return read(view_tokens, text_tokens, plan)
    views = view_tokens.split(plan.views_per_image)
    results: dict[int, Read] = {}
    for images in buckets:
        part, chosen = plan.of_images(sorted(images))
        if chosen:
            found = read(torch.cat([views[image] for image in sorted(images)]), [text_tokens[g] for g in chosen], part)
            results.update(zip(chosen, found, strict=True))
    return [results[g] for g in range(len(plan.segments))]


def _has_company() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

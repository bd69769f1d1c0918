"""Visual tokens of prompts, with everything kept that can be used again.

Three things are kept, by the picture's content, in one cache bounded by bytes:

    views     view tokens (V, T, C) of a picture
    state     the fusion decoder's keys and values behind those views, which every question continues
    tokens    visual tokens (m, H) of picture, question and m

Variants with a fusion row per turn read every question by itself, so all three are shared between conversations. Where
a question reads those before it (published variants), states and tokens go by the questions so far. Shape legend in
`modeling_fusedvlm_fusion.py`.
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock, RLock
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_turns import share_cache
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.processing.processing_fusedvlm_plan import PromptPlan

from .byte_cache import ByteCache, KnownImage, size_of

MOST_VIEWS = 40  # that go through the vision tower, or stand before the fusion decoder, in one pass
_NAMES: WeakKeyDictionary = WeakKeyDictionary()  # model -> what names it in a cache that several models share
Question = tuple[tuple[int, ...], int]  # its tokens, and m
Step = tuple[str, tuple[Question, ...]]  # an image's key, and the questions about it so far


@dataclass
class EncoderCounts:
    """How often the parts ran: `views` and `questions` that were computed, `images` and `segments` asked for."""

    images: int = 0
    segments: int = 0
    views: int = 0
    tower_images: int = 0
    started: int = 0
    questions: int = 0


@dataclass
class VisualPrompt:
    """A prompt with its visual tokens: `keys` name every position, so that equal prefixes can be found."""

    input_ids: list[int]
    visual_tokens: list[torch.Tensor]
    keys: list[Hashable] = field(default_factory=list)


@dataclass
class _Segment:
    """One question about one image that has to be answered; `history` ends with the question itself."""

    image: KnownImage
    history: tuple[Question, ...]
    key: Hashable


class VisualEncoder:
    """Vision tower, connector and projection behind a cache.

    Args:
        model: `FusedVLMEncoder`, or the whole model.
        processor: its processor.
        cache: where to keep things; may be shared with others.
    """

    def __init__(self, model: Any, processor: Any, cache: ByteCache) -> None:
        self.core = model if hasattr(model, "fuse") else model.model
        self.processor, self.cache = processor, cache
        self.config = model.config
        self.counts = EncoderCounts()
        self._lock = RLock()
        # Tokenizers keep settings of a call (whether special tokens are text) in themselves; two at once mix them.
        self.text_lock = Lock()
        self._name = _NAMES.setdefault(self.core, uuid4().hex)
        self._is_fused = self.config.connector == "fused"
        # Questions that read each other are named with those before them.
        self._alone = bool(self.config.fusion_row_per_turn) or not self._is_fused

    @torch.inference_mode()
    def encode(self, plans: Sequence[PromptPlan], images: Sequence[Sequence[KnownImage]]) -> list[VisualPrompt]:
        """Visual tokens of prompts, all that is missing in one batch.

        Args:
            plans: from `processor.plan_prompts`.
            images: of every prompt, in the order of its image markers.

        Raises:
            ValueError: for pictures that cannot be read, and when a prompt has another number of images.
        """
        segments = [self._segments(plan, shown) for plan, shown in zip(plans, images, strict=True)]
        with self._lock:
            self.counts.images += sum(len(shown) for shown in images)
            self.counts.segments += sum(len(part) for part in segments)
            found = self._tokens([segment for part in segments for segment in part])
        return [
            self._prompt(plan, part, [found[segment.key] for segment in part])
            for plan, part in zip(plans, segments, strict=True)
        ]

    @torch.inference_mode()
    def encode_items(self, items: Sequence[tuple[KnownImage, tuple[Question, ...]]]) -> list[torch.Tensor]:
        """Visual tokens (m, H) of the last question of each (image, questions so far)."""
        segments = [self._segment(image, history) for image, history in items]
        with self._lock:
            found = self._tokens(segments)
        return [found[segment.key] for segment in segments]

    def _segment(self, image: KnownImage, history: Sequence[Question]) -> _Segment:
        counted = tuple(history[-1:] if self._alone else history)
        return _Segment(image, counted, ("tokens", self._name, image.key, counted))

    def _segments(self, plan: PromptPlan, images: Sequence[KnownImage]) -> list[_Segment]:
        if len(images) != plan.num_images:
            raise ValueError(f"The prompt shows {plan.num_images} images, but {len(images)} were given.")
        asked: dict[int, list[Question]] = {}
        segments = []
        for part in plan.segments:
            history = asked.setdefault(part.image, [])
            history.append((part.question_input_ids, part.num_visual_tokens))
            segments.append(self._segment(images[part.image], history))
        return segments

    def _prompt(self, plan: PromptPlan, segments: list[_Segment], tokens: list[torch.Tensor]) -> VisualPrompt:
        token_id = self.config.image_token_id
        ids = plan.expand(token_id, [len(part) for part in tokens])
        # What stands at a placeholder is named by the segment and the place in it.
        names = [hashlib.blake2b(repr(segment.key).encode(), digest_size=16).digest() for segment in segments]
        visual = iter([(name, n) for name, part in zip(names, tokens, strict=True) for n in range(len(part))])
        return VisualPrompt(ids, tokens, [next(visual) if token == token_id else token for token in ids])

    def _tokens(self, segments: list[_Segment]) -> dict[Hashable, torch.Tensor]:
        found: dict[Hashable, torch.Tensor] = {}
        missing: dict[Hashable, _Segment] = {}
        for segment in segments:
            if segment.key in found or segment.key in missing:
                continue
            tokens = self.cache.get(segment.key)
            if tokens is None:
                missing[segment.key] = segment
            else:
                found[segment.key] = tokens
        if missing:
            self.counts.questions += len(missing)
            work = list(missing.values())
            states = self._continue(work) if self._is_fused else self._reduce(work)
            for segment, state in zip(work, states, strict=True):
                tokens = self.core.connector.project(state).clone()
                found[segment.key] = tokens
                self.cache.put(segment.key, tokens, size_of(tokens))
        return found

    def has_views(self, image: KnownImage) -> bool:
        """Whether a picture's view tokens are kept, so that it need not be decoded."""
        return self.cache.peek(("views", self._name, image.key)) is not None

    # -- views ---------------------------------------------------------------------------------------------------------

    def _views(self, images: Sequence[KnownImage]) -> dict[str, torch.Tensor]:
        """{key: (V, T, C)} of pictures."""
        found, missing = {}, {}
        for image in images:
            views = self.cache.get(("views", self._name, image.key))
            if views is None:
                missing[image.key] = image
            else:
                found[image.key] = views
        if missing:
            found.update(self._see(list(missing.values())))
        return found

    def _see(self, images: list[KnownImage]) -> dict[str, torch.Tensor]:
        pixel_values, counts = self.see(images)
        device = next(self.core.vision_tower.parameters()).device
        parts = [self.core.get_view_features(part.to(device))[0] for part in pixel_values.split(MOST_VIEWS)]
        self.counts.views += sum(counts)
        self.counts.tower_images += len(images)
        found = {}
        for image, views in zip(images, torch.cat(parts).split(counts), strict=True):
            found[image.key] = views.clone()  # of its own, so that a picture that leaves the cache leaves memory
            self.cache.put(("views", self._name, image.key), found[image.key], size_of(views))
        return found

    def see(self, images: list[KnownImage]) -> tuple[torch.Tensor, list[int]]:
        """(V, 3, S, S) of all images, and how many views each has."""
        sources = [load_image(image.source) if isinstance(image.source, bytes) else image.source for image in images]
        data = self.processor.image_processor(sources, return_tensors="pt")
        return data["pixel_values"], [int(number) for number in data["image_num_views"]]

    def _reduce(self, work: list[_Segment]) -> list[torch.Tensor]:
        """States of connectors that keep nothing between questions, in one pass."""
        images = {segment.image.key: segment.image for segment in work}
        views = self._views(list(images.values()))
        order = [n for key in images for n, segment in enumerate(work) if segment.image.key == key]
        asked = [work[n].history[-1] for n in order]
        reads = bool(self.config.fuse_question)
        device = next(iter(views.values())).device
        fused, _ = self.core.fuse(
            view_features=torch.cat([views[key] for key in images]),
            image_num_views=[len(views[key]) for key in images],
            image_num_questions=[sum(segment.image.key == key for segment in work) for key in images],
            num_visual_tokens=[m for _, m in asked],
            question_lengths=[len(ids) for ids, _ in asked] if reads else None,
            question_input_ids=torch.tensor([i for ids, _ in asked for i in ids], device=device) if reads else None,
        )
        states: list[torch.Tensor] = [fused.segment_states[0]] * len(work)
        for place, n in enumerate(order):
            states[n] = fused.segment_states[place]
        return states

    # -- fusion --------------------------------------------------------------------------------------------------------

    def _continue(self, work: list[_Segment]) -> list[torch.Tensor]:
        """(m, C) states of every segment; questions that read others come after those."""
        states: dict[Step, torch.Tensor] = {}
        caches = self._start({segment.image.key: segment.image for segment in work})
        rounds: list[dict[Step, None]] = []  # without repetition, in order
        for segment in work:
            # Of a history the part that is not kept has to be read question by question.
            begin = next(n for n in range(len(segment.history) - 1, -1, -1) if self._has(caches, segment, n))
            for place, stop in enumerate(range(begin + 1, len(segment.history) + 1)):
                while len(rounds) <= place:
                    rounds.append({})
                rounds[place][segment.image.key, segment.history[:stop]] = None
        for steps in rounds:
            states.update(zip(steps, self._read(list(steps), caches), strict=True))
        return [states[segment.image.key, segment.history] for segment in work]

    def _has(self, caches: dict[Hashable, Cache], segment: _Segment, length: int) -> bool:
        """Whether the fusion decoder has read the views and the first `length` questions; looks into the cache too."""
        key = segment.image.key, segment.history[:length] if not self._alone else ()
        if key in caches:
            return True
        kept = self.cache.get(("state", self._name, *key))
        if kept is not None:
            caches[key] = kept
        return kept is not None

    def _start(self, images: dict[str, KnownImage]) -> dict[Hashable, Cache]:
        """{(image, no questions): keys and values behind its views}, of those that are not kept in batches."""
        found: dict[Hashable, Cache] = {}
        missing = []
        for key, image in images.items():
            state = self.cache.get(("state", self._name, key, ()))
            if state is None:
                missing.append(image)
            else:
                found[key, ()] = state
        views = self._views(missing) if missing else {}
        batch: list[str] = []
        for number, image in enumerate(missing):
            batch.append(image.key)
            is_last = number == len(missing) - 1
            if is_last or sum(len(views[key]) for key in batch) + len(views[missing[number + 1].key]) > MOST_VIEWS:
                self.counts.started += len(batch)
                together = torch.cat([views[key] for key in batch])
                started = self.core.start_fusions(together, [len(views[key]) for key in batch])
                for key, state in zip(batch, started, strict=True):
                    found[key, ()] = state
                    self.cache.put(("state", self._name, key, ()), state, size_of(state))
                batch = []
        return found

    def _read(self, steps: list[Step], caches: dict[Hashable, Cache]) -> list[torch.Tensor]:
        """One more question behind each of several states, which are kept where later questions read it."""
        before = [share_cache(caches[image, () if self._alone else history[:-1]]) for image, history in steps]
        asked = [history[-1] for _, history in steps]
        first: Any = before[0].layers[0]
        states = self.core.continue_fusions(
            before,
            torch.tensor([i for ids, _ in asked for i in ids], dtype=torch.long, device=first.keys.device),
            [len(ids) for ids, _ in asked],
            [m for _, m in asked],
        )
        for (image, history), state in zip(steps, before, strict=True) if not self._alone else ():
            caches[image, history] = state
            self.cache.put(("state", self._name, image, history), state, size_of(state))
        return states

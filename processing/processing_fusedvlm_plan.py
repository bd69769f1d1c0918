"""What a server needs of a prompt: its token ids with one placeholder per shown image, and what is asked about which.

A server encodes images apart from the language model. It keeps visual tokens by image, question and m, and puts them
where the placeholders stand; how many those are it knows from the segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .processing_fusedvlm_prompt import Prompt


@dataclass(frozen=True)
class PromptSegment:
    """One question asked about one image, where the prompt shows it.

    Args:
        image: number of the image inside the prompt, in the order of the images.
        turn: number of the user's turn.
        question: its text.
        question_input_ids: its tokens for the connector; none where it reads no question.
        num_visual_tokens: m or m', of each view where the connector counts by view.
    """

    image: int
    turn: int
    question: str
    question_input_ids: tuple[int, ...]
    num_visual_tokens: int


@dataclass
class PromptPlan:
    """A prompt whose placeholders are not yet repeated: `input_ids` has one of them per entry of `segments`."""

    input_ids: list[int]
    segments: list[PromptSegment] = field(default_factory=list)
    num_images: int = 0

    def expand(self, image_token_id: int, sizes: Sequence[int] | None = None) -> list[int]:
        """Token ids as the model reads them: every placeholder as often as its segment has visual tokens.

        Args:
            image_token_id: the placeholder.
            sizes: visual tokens of each segment; by default its m, which is not enough where m counts by view.

        Raises:
            ValueError: when there are not as many sizes as placeholders.
        """
        sizes = [segment.num_visual_tokens for segment in self.segments] if sizes is None else list(sizes)
        places = self.input_ids.count(image_token_id)
        if len(sizes) != places:
            raise ValueError(f"{len(sizes)} sizes for {places} placeholders.")
        left = iter(sizes)
        expanded: list[int] = []
        for token in self.input_ids:
            expanded.extend([token] * next(left) if token == image_token_id else [token])
        return expanded


class PromptPlanning:
    """`plan_prompts`, for the processor."""

    image_token_id: int
    counts: Any
    _parse: Any
    _chosen: Any
    _counts: Any
    _merged: Any
    _encode_text: Any
    _marker_sizes: Any
    _tokenize_questions: Any

    def plan_prompts(
        self,
        text: str | list[str],
        questions: str | list[str] | list[list[str]] | None = None,
        num_visual_tokens: int | str | list[int | str] | None = None,
        num_followup_visual_tokens: int | list[int] | None = None,
        image_num_views: list[int] | None = None,
        num_visual_tokens_policy: str | None = None,
        **kwargs: Any,
    ) -> list[PromptPlan]:
        """Token ids with one placeholder per shown image, and the segments behind them, of each prompt.

        Arguments and errors as in a call. `image_num_views` (views of every image) makes the check of the prompt's
        length exact where m counts by view. A placeholder is missing where m' = 0.

        Example:
            text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            (plan,) = processor.plan_prompts(text, num_visual_tokens=4)
        """
        prompts = self._parse(text, questions)
        asked = self._chosen(prompts, num_visual_tokens)
        counts = self._counts(len(prompts), asked, num_followup_visual_tokens, num_visual_tokens_policy)
        views = image_num_views
        if views is None and self.counts.per_view:
            views = [1] * sum(prompt.num_images for prompt in prompts)
        sizes = self._marker_sizes(prompts, counts, views)
        rows = self._encode_text(prompts, sizes, False, self._merged(kwargs))["input_ids"]
        return [
            self._plan(prompt, row, row_sizes, pair)
            for prompt, row, row_sizes, pair in zip(prompts, rows, sizes, counts, strict=True)
        ]

    def _plan(self, prompt: Prompt, row: list[int], sizes: list[int], counts: tuple[int, int]) -> PromptPlan:
        ids: list[int] = []
        left, skip = iter([size for size in sizes if size]), 0
        for token in row:
            if token != self.image_token_id:
                ids.append(token)
            elif skip:
                skip -= 1
            else:
                ids.append(token)
                skip = next(left) - 1
        places = _shown_images(prompt)
        asked = [prompt.turns[turn].question for _, turn, _ in places]
        tokens = self._tokenize_questions(asked) if asked and self.counts.reads_question else [[] for _ in asked]
        segments = [
            PromptSegment(image, turn, question, tuple(question_ids), counts[0] if is_new else counts[1])
            for (image, turn, is_new), question, question_ids in zip(places, asked, tokens, strict=True)
        ]
        return PromptPlan(ids, [part for part in segments if part.num_visual_tokens], prompt.num_images)


def _shown_images(prompt: Prompt) -> list[tuple[int, int, bool]]:
    """(image, turn, whether it is new) of every image marker, in the order of the text."""
    places, new, turn, seen = [], 0, -1, 0
    for piece in prompt.pieces:
        if piece.turn != turn:
            turn, seen = piece.turn, 0
        if piece.kind == "image":
            places.append((new, turn, True))
            new += 1
        elif piece.kind == "again":
            places.append((seen, turn, False))
            seen += 1
    return places


__all__ = ["PromptPlan", "PromptPlanning", "PromptSegment"]

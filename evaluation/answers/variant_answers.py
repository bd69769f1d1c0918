"""A variant answers at every m: pictures through the tower once, questions through the fusion once for all m.

Only the language model runs anew for each m, for the prompts differ. Questions of a batch are decoded together; rows of
one m stand side by side, so that little is padded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedvlm.evaluation.tasks.task import ImageData
from fusedvlm.processing import exactly_as_asked
from fusedvlm.serving.chat import VisualChat

from .view_store import ViewStore

BATCH_SIZE = 32
CHARACTERS_PER_TOKEN = 3  # of a prompt, about; only how many rows are decoded together depends on it


@dataclass(frozen=True)
class Asked:
    """One question as a model gets it: `question` is what the fusion module reads, `prompt` what the LLM reads."""

    prompt: str
    question: str
    images: tuple[ImageData, ...]
    max_new_tokens: int


class VariantAnswers:
    """Greedy answers of a variant.

    Args:
        chat: the variant.
        view_cache: folder that keeps view tokens in 16 bits from run to run.
        batch_size: questions whose images are fused together, and rows that are decoded together.
    """

    def __init__(self, chat: VisualChat, view_cache: Path | None = None, batch_size: int = BATCH_SIZE) -> None:
        self.model, self.processor, self.batch_size = chat.model, chat.processor, batch_size
        self.views = ViewStore(self.model, self.processor.image_processor, view_cache)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an answer beside weights, prompt and m."""
        stored = self.views.storage_dtype
        return {"dtype": _short(self.model.dtype), "views": _short(stored or self.model.dtype), "decoding": "greedy"}

    def check_counts(self, counts: Sequence[int]) -> None:
        """Raise `ValueError` for an m that the variant does not give."""
        for count in counts:
            self.model.config.check_num_visual_tokens(count)

    @torch.inference_mode()
    def answer(self, batch: Sequence[Asked], counts: Sequence[int]) -> list[dict[int, str]]:
        """Answers to each question at each m.

        Args:
            batch: questions with the same cap.
            counts: numbers of visual tokens.
        """
        texts = [self._render(asked) for asked in batch]
        features = self._features(batch, texts, counts)
        rows = [(number, m) for m in sorted(counts) for number in range(len(batch))]
        answers: list[dict[int, str]] = [{} for _ in batch]
        cap = max(asked.max_new_tokens for asked in batch)
        for part in self._chunks(rows, batch, features, cap):
            for (number, m), text in zip(part, self._decode_what_fits(part, batch, texts, features, cap), strict=True):
                answers[number][m] = text
        return answers

    def _chunks(
        self, rows: Sequence[tuple[int, int]], batch: Sequence[Asked], features: dict[int, list[torch.Tensor]], cap: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Rows to decode together: `batch_size` of the largest m, and more of smaller ones, which need less memory."""

        def size(row: tuple[int, int]) -> int:
            number, m = row
            return len(features[m][number]) + len(batch[number].prompt) // CHARACTERS_PER_TOKEN + cap

        budget = self.batch_size * max(map(size, rows))
        chunk: list[tuple[int, int]] = []
        longest = 0
        for row in rows:
            if chunk and max(longest, size(row)) * (len(chunk) + 1) > budget:
                yield chunk
                chunk, longest = [], 0
            chunk.append(row)
            longest = max(longest, size(row))
        yield chunk

    def _render(self, asked: Asked) -> str:
        content = [{"type": "image"}] * len(asked.images) + [{"type": "text", "text": asked.prompt}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode(self, batch: Sequence[Asked], texts: list[str], counts: list[int], views: list[int] | None) -> dict:
        kwargs: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        kwargs.update(exactly_as_asked(self.processor))
        if any(asked.question != asked.prompt for asked in batch) and self.model.config.fuse_question:
            kwargs["questions"] = [[asked.question] if asked.images else [] for asked in batch]
        if views is not None:
            kwargs["image_num_views"] = views
        return dict(self.processor.encode_prompts(text=texts, num_visual_tokens=counts, **kwargs))

    def _features(
        self, batch: Sequence[Asked], texts: list[str], counts: Sequence[int]
    ) -> dict[int, list[torch.Tensor]]:
        """{m: visual tokens of each question's images, those of a question without images empty}."""
        images = [image for asked in batch for image in asked.images]
        if not images:
            return {m: [torch.empty(0)] * len(batch) for m in counts}
        tokens = self.views.get(images)
        self.num_views = {image.digest: len(part) for image, part in zip(images, tokens, strict=True)}
        views = [len(part) for part in tokens]
        encoded = self._encode(batch, texts, [max(counts)] * len(batch), views)
        inputs = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in encoded.items()
            if name not in ("input_ids", "attention_mask", "num_visual_tokens")
        }
        inputs.update(view_features=torch.cat(tokens), image_num_views=torch.tensor(views))
        if hasattr(self.model, "get_image_features_every_count"):
            found = self.model.get_image_features_every_count(list(counts), **inputs)
        else:  # a variant that brings older code: the views are shared, the fusion is not
            found = {m: self._at(m, inputs, len(images)) for m in counts}
        return {m: _by_sample(features.pooler_output, batch) for m, features in found.items()}

    def _at(self, m: int, inputs: dict[str, Any], num_images: int) -> Any:
        return self.model.get_image_features(num_visual_tokens=torch.full((num_images,), m), return_dict=True, **inputs)

    def _decode_what_fits(self, rows: Sequence[tuple[int, int]], *about: Any) -> list[str]:
        """`_decode`, in halves where an accelerator's memory does not hold all rows at once."""
        try:
            return self._decode(rows, *about)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(rows) // 2
        return self._decode_what_fits(rows[:middle], *about) + self._decode_what_fits(rows[middle:], *about)

    def _decode(
        self,
        rows: Sequence[tuple[int, int]],
        batch: Sequence[Asked],
        texts: list[str],
        features: dict[int, list[torch.Tensor]],
        cap: int,
    ) -> list[str]:
        """Answers of rows (question, m)."""
        asked = [batch[number] for number, _ in rows]
        views = [self.num_views[image.digest] for entry in asked for image in entry.images] or None
        encoded = self._encode(asked, [texts[number] for number, _ in rows], [m for _, m in rows], views)
        inputs = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        shown = [features[m][number] for number, m in rows]
        if any(len(tokens) for tokens in shown):
            inputs["mm_encoder_outputs"] = {
                "image": VisualTokens(
                    pooler_output=[tokens for tokens in shown if len(tokens)],
                    visual_tokens_per_sample=[len(tokens) for tokens in shown],
                )
            }
        output = self.model.generate(**inputs, max_new_tokens=cap, do_sample=False, num_beams=1)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


class VisualTokens(dict):
    """Visual tokens of the rows of a batch, in the form that `generate` takes as `mm_encoder_outputs["image"]`."""

    @property
    def pooler_output(self) -> list[torch.Tensor]:
        """(tokens, H) of each row that shows images."""
        return self["pooler_output"]


def _by_sample(tokens: Sequence[torch.Tensor], batch: Sequence[Asked]) -> list[torch.Tensor]:
    left = iter(tokens)
    return [next(left) if asked.images else torch.empty(0) for asked in batch]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

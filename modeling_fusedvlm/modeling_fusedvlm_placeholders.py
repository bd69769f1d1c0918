"""Put visual tokens where the prompt has placeholders, after counting both sample by sample.

A mismatch that only shows in batch totals would slide one sample's visual tokens into the next; so counts are compared
per sample and the error names the sample.
"""

import copy
from typing import Any

import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.utils import ModelOutput, torch_compilable_check


def placeholder_mask(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_token_id: int, embed_tokens: torch.nn.Module
) -> torch.Tensor:
    """(B, L) bool, True at placeholders; found by embedding when the ids are not given."""
    if input_ids is not None:
        return input_ids == image_token_id
    placeholder = embed_tokens(torch.tensor(image_token_id, device=inputs_embeds.device))
    return (inputs_embeds == placeholder).all(-1)


def check_placeholders(found: list[int], expected: list[int] | None, segment_lengths: list[int]) -> None:
    """Raise `ValueError` when a sample's placeholders differ from its visual tokens.

    Args:
        found: placeholders per prompt row.
        expected: visual tokens per conversation, one for each row: a generation that multiplies rows multiplies these
            too (`repeat_features`), and nobody else may. None when a prompt is being fed in chunks: then the segments
            are counted off in order.
        segment_lengths: visual tokens per segment, in prompt order.
    """
    if expected is not None:
        if len(found) != len(expected):
            raise ValueError(f"The batch has {len(found)} prompts, but images were given for {len(expected)} samples.")
        for sample, (count, wanted) in enumerate(zip(found, expected, strict=True)):
            if count != wanted:
                raise _mismatch(sample, wanted, count)
        return
    if sum(found) != sum(segment_lengths):
        raise _mismatch(0 if len(found) == 1 else "all", sum(segment_lengths), sum(found))


def _mismatch(sample: int | str, expected: int, found: int) -> ValueError:
    return ValueError(
        f"Sample {sample}: expected {expected} visual tokens (one placeholder each), found {found} placeholders in "
        "input_ids. Build the batch with the processor, and pass num_visual_tokens to the processor, not to the model."
    )


def scatter_visual_tokens(
    inputs_embeds: torch.Tensor, mask: torch.Tensor, visual_tokens: list[torch.Tensor], expected: list[int] | None
) -> torch.Tensor:
    """Replace the embeddings at placeholders by visual tokens.

    Args:
        inputs_embeds: (B, L, H).
        mask: (B, L) bool, True at placeholders.
        visual_tokens: list of (tokens, H) in prompt order, however they are grouped.
        expected: visual tokens per conversation, see `check_placeholders`.

    Returns:
        (B, L, H).

    Raises:
        ValueError: naming the sample, the expected and the found count.
    """
    found = mask.sum(-1).tolist()
    check_placeholders(found, expected, [len(tokens) for tokens in visual_tokens])
    if not visual_tokens:
        return inputs_embeds
    features = torch.cat(list(visual_tokens)).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)


def repeat_features(features: ModelOutput, copies: int) -> ModelOutput:
    """Visual tokens for prompts of which each was repeated `copies` times in a row, as beams and samples are.

    A new object: the caller's own may be used for another generation.
    """
    repeated = copy.copy(features)
    for name in ("pooler_output", "visual_tokens_per_sample"):
        if features.get(name) is not None:
            repeated[name] = [entry for entry in features[name] for _ in range(copies)]
    return repeated


def refuse_placeholders(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_token_id: int, embed_tokens: torch.nn.Module
) -> None:
    """Raise `ValueError` when a prompt without images has placeholders, as ids or already embedded."""
    if input_ids is not None:
        found = (input_ids == image_token_id).any()
    else:
        row = embed_tokens(torch.tensor(image_token_id, device=inputs_embeds.device))
        # A row of zeros also stands for padding.
        found = (inputs_embeds == row).all(-1).any() & (row != 0).any()
    torch_compilable_check(
        ~found,
        "The prompt has image placeholders but no images were given: expected 0 in every sample. Pass everything that "
        "FusedVLMProcessor returns to the model.",
    )


class SuppressingLogitsProcessorList(LogitsProcessorList):
    """Logits processors of a generation, of which suppressed tokens cost nothing that grows with the vocabulary.

    transformers looks for suppressed ids among all ids, in every step: 1.3 ms per token at 152,000 ids, to forbid one.
    """

    suppressed: list[int] = []
    in_place = False

    @classmethod
    def of(cls, processors: LogitsProcessorList, in_place: bool) -> LogitsProcessorList:
        """The same processors, with suppressed tokens struck out first; without any, the list as it is.

        Args:
            processors: as transformers chose them.
            in_place: whether scores may be overwritten; not where `generate` returns them as the raw logits.
        """
        found = [one for one in processors if type(one) is SuppressTokensLogitsProcessor]
        if not found:
            return processors
        own = cls(one for one in processors if one not in found)
        own.suppressed = sorted({token for one in found for token in one.suppress_tokens.tolist()})
        own.in_place = in_place
        return own

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, L) ids and (B, vocabulary) scores to the scores with minus infinity at what is suppressed, processed."""
        scores = scores if self.in_place else scores.clone()
        for token in self.suppressed:
            if token < scores.shape[-1]:
                scores.select(-1, token).fill_(-torch.inf)
        return super().__call__(input_ids, scores, **kwargs)

"""Put visual tokens where the prompt has placeholders, after counting both sample by sample.

A mismatch that only shows in batch totals would slide one sample's visual tokens into the next; so counts are compared
per sample and the error names the sample.
"""

import torch


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
        expected: visual tokens per conversation. Beam search repeats each conversation's row, so there may be k rows
            per conversation. None when a prompt is being fed in chunks: then the segments are counted off in order.
        segment_lengths: visual tokens per segment, in prompt order.
    """
    if expected is not None and len(found) % max(len(expected), 1) == 0 and expected:
        copies = len(found) // len(expected)
        for row, count in enumerate(found):
            sample = row // copies
            if count != expected[sample]:
                raise _mismatch(sample, expected[sample], count)
        return
    if expected is not None:
        raise ValueError(f"The batch has {len(found)} prompts, but images were given for {len(expected)} samples.")
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
    total = sum(len(tokens) for tokens in visual_tokens)
    if total != sum(found):  # beam search repeated the prompts, conversation by conversation, but not the visual tokens
        visual_tokens = [tokens for tokens in visual_tokens for _ in range(sum(found) // total)]
    features = torch.cat(list(visual_tokens)).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)

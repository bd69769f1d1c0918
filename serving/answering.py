"""Prompts with their visual tokens, and answers to them, from a model in this process; nothing is computed twice."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_encoder import embed_prompt

from .byte_cache import ByteCache, KnownImage, know_image
from .prefix_cache import PrefixCache
from .visual_encoder import VisualEncoder, VisualPrompt

GIBIBYTE = 2**30
IMAGE_KEYS = ("image", "url", "path", "base64")
# Settings of `generate` with which several rows, or another kind of cache, continue one prompt.
NO_PREFIX = ("num_beams", "num_return_sequences", "assistant_model", "prompt_lookup_num_tokens", "cache_implementation")


@dataclass
class Answer:
    """What `generate` made of one prompt: new tokens, and how many positions of the prompt had been read before."""

    token_ids: list[int]
    reused_tokens: int = 0


class Answerer:
    """A whole model that answers prompts, with a cache before and one inside its language model.

    Args:
        model: `FusedVLMForConditionalGeneration`, on its device.
        processor: its processor.
        cache: for views, fusion states and visual tokens; may be shared.
        language_cache_bytes: bound on the language model's keys and values that are kept between calls.
    """

    def __init__(self, model: Any, processor: Any, cache: ByteCache, language_cache_bytes: int) -> None:
        self.model, self.processor = model, processor
        self.encoder = VisualEncoder(model, processor, cache)
        self.prefixes = PrefixCache(language_cache_bytes)

    def prompts(
        self,
        conversations: list[list[dict]],
        num_visual_tokens: int | str | Sequence[int | str] | None = None,
        num_followup_visual_tokens: int | Sequence[int] | None = None,
    ) -> list[VisualPrompt]:
        """Conversations to prompts with their visual tokens.

        Raises:
            ValueError: for messages, pictures and counts that cannot be read; the message says which.
        """
        with self.encoder.text_lock:
            plans, images = read_conversations(
                self.processor, conversations, num_visual_tokens, num_followup_visual_tokens
            )
        return self.encoder.encode(plans, images)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[VisualPrompt], streamer: Any = None, **kwargs: Any) -> list[Answer]:
        """New tokens for every prompt; `kwargs` as for `generate`. A single prompt continues what was read before."""
        embeds = [embed_prompt(self.model, prompt.input_ids, prompt.visual_tokens) for prompt in prompts]
        length = max(len(rows) for rows in embeds)
        pad = self.processor.tokenizer.pad_token_id or 0
        inputs_embeds = torch.stack([torch.nn.functional.pad(rows, (0, 0, length - len(rows), 0)) for rows in embeds])
        ids = [[pad] * (length - len(prompt.input_ids)) + prompt.input_ids for prompt in prompts]
        mask = [[0] * (length - len(prompt.input_ids)) + [1] * len(prompt.input_ids) for prompt in prompts]
        may_go_on = self._may_go_on(prompts, kwargs)
        state, reused = self.prefixes.take(prompts[0].keys) if may_go_on else (None, 0)
        if state is not None:
            kwargs["past_key_values"] = state
        if may_go_on:
            kwargs["return_dict_in_generate"] = True  # for the cache, whose layers are the language model's own kinds
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=inputs_embeds.device),
            inputs_embeds=inputs_embeds,
            attention_mask=torch.tensor(mask, device=inputs_embeds.device),
            streamer=streamer,
            **kwargs,
        )
        new = getattr(output, "sequences", output)[:, length:].tolist()
        state = output.past_key_values if may_go_on else None
        if state is not None:
            keys: list[Hashable] = [*prompts[0].keys, *new[0]]
            self.prefixes.keep(keys[: state.get_seq_length()], state)
        return [Answer(row, reused) for row in new]

    def _may_go_on(self, prompts: Sequence[VisualPrompt], kwargs: dict) -> bool:
        """Whether there is a single prompt, and its settings allow it to go on from another one's cache."""
        settings = self.model.generation_config
        special = [name for name in NO_PREFIX if (kwargs.get(name) or getattr(settings, name, None)) not in (None, 1)]
        has_own = kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is False
        return len(prompts) == 1 and not special and not has_own and self.prefixes.cache.max_bytes > 0

    def clear(self) -> None:
        """Forget everything that was kept."""
        self.encoder.cache.clear()
        self.prefixes.cache.clear()


def read_conversations(
    processor: Any,
    conversations: list[list[dict]],
    num_visual_tokens: int | str | Sequence[int | str] | None = None,
    num_followup_visual_tokens: int | Sequence[int] | None = None,
) -> tuple[list, list[list[KnownImage]]]:
    """Plans of conversations and their pictures, as `VisualEncoder.encode` takes them."""
    texts = [
        processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for conversation in conversations
    ]
    images = [[know_image(source) for source in images_of(conversation)] for conversation in conversations]
    plans = processor.plan_prompts(
        texts,
        num_visual_tokens=_as_given(num_visual_tokens),
        num_followup_visual_tokens=_as_given(num_followup_visual_tokens),
    )
    return plans, images


def _as_given(counts: int | str | Sequence[int | str] | None) -> Any:
    return list(counts) if isinstance(counts, (list, tuple)) else counts


def images_of(conversation: list[dict]) -> list[Any]:
    """Pictures of a conversation, in the order in which it shows them."""
    found = []
    for message in conversation:
        for part in message["content"] if not isinstance(message["content"], str) else ():
            if part.get("type") == "image_url":
                address = part["image_url"]
                found.append(address["url"] if isinstance(address, dict) else address)
            elif part.get("type") == "image":
                found += [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
    return found

"""Chats and texts to token ids with one placeholder per shown image, by the variant's own processor."""

from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any

from vllm.inputs import TokensPrompt
from vllm.renderers.hf import HfRenderer

from fusedvlm.processing.processing_fusedvlm import RENDERED

COUNTS = ("num_visual_tokens", "num_followup_visual_tokens")


class FusedVLMRenderer(HfRenderer):
    """vLLM's renderer for templates of transformers, whose texts go through our processor.

    m and m' of a request stand where transformers' own server takes them:
    `chat_template_kwargs={"processor_kwargs": {"num_visual_tokens": 4}}`.
    """

    @cached_property
    def _processor(self) -> Any:
        return self.get_mm_processor().info.get_hf_processor()

    @cached_property
    def _text_lock(self) -> Any:
        return Lock()  # tokenizers keep settings of a call in themselves

    def _take_counts(self, params: Any) -> tuple[Any, dict]:
        kwargs = dict(params.chat_template_kwargs or {})
        asked = kwargs.pop("processor_kwargs", None) or {}
        if not isinstance(asked, dict) or set(asked) - set(COUNTS):
            raise ValueError(f"processor_kwargs takes {' and '.join(COUNTS)} alone.")
        for name, value in asked.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={str(value)[:60]!r} is not a whole number of visual tokens.")
        return replace(params, chat_template_kwargs={**kwargs, RENDERED: True, "tokenize": False}), dict(asked)

    def render_messages(self, messages: Any, params: Any) -> Any:
        """As the base class, with the request's counts beside the prompt."""
        params, counts = self._take_counts(params)
        conversation, prompt = super().render_messages(messages, params)
        prompt["mm_processor_kwargs"] = counts
        return conversation, prompt

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """See `render_messages`."""
        params, counts = self._take_counts(params)
        conversation, prompt = await super().render_messages_async(messages, params)
        prompt["mm_processor_kwargs"] = counts
        return conversation, prompt

    def _tokenize_prompt(self, prompt: Any, params: Any) -> TokensPrompt:
        given = dict(prompt.get("mm_processor_kwargs") or {})
        with self._text_lock:
            (plan,) = self._processor.plan_prompts(prompt["prompt"], **given)
        alone = self._processor.connector is not None or self.model_config.hf_config.fusion_row_per_turn
        asked: dict[int, list] = {}
        segments = []  # (image, [(question's ids, m), ...]): what the visual tokens at a placeholder depend on
        for part in plan.segments:
            history = asked.setdefault(part.image, [])
            history.append((list(part.question_input_ids), part.num_visual_tokens))
            segments.append((part.image, history[-1:] if alone else list(history)))
        kept = {name: value for name, value in prompt.items() if name not in ("prompt", "mm_processor_kwargs")}
        images = (kept.get("multi_modal_data") or {}).get("image")
        given_images = len(images) if isinstance(images, list) else int(images is not None)
        if given_images != plan.num_images:
            raise ValueError(f"The prompt shows {plan.num_images} images, but {given_images} were given.")
        return TokensPrompt(prompt_token_ids=list(plan.input_ids), **kept, mm_processor_kwargs={"segments": segments})

    async def _tokenize_prompt_async(self, prompt: Any, params: Any) -> TokensPrompt:
        return self._tokenize_prompt(prompt, params)

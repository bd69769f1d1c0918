"""Hidden states of the two branches of a pair: two answers to one prompt, or two images in one prompt."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jinja2
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusedvlm.console import say

from .pairs import ImagePair, TextPair

if TYPE_CHECKING:
    from fusedvlm.processing import FusedVLMProcessor

States = tuple[np.ndarray, np.ndarray]


class BranchEncoder(Protocol):
    """Turns pairs into states; the only part of a divergence measurement that knows the model."""

    max_tokens: int

    def states(self, pairs: Sequence[Any]) -> list[States | None]:
        """Per pair the states (N, d) of both branches, float32; None where a branch has no token."""
        ...


class TextBranches:
    """Last hidden states (after the final norm) of a causal LM at the tokens of both answers.

    The prompt is rendered by the tokenizer's chat template and computed once per pair; both answers, cut to their
    common length N, continue from its key-value cache, one forward pass each.

    Args:
        model: any causal LM; only its body runs, the LM head does not.
        tokenizer: its tokenizer.
        max_tokens: longest N.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.body: Any = model.base_model.eval()
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.position_limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._said: set[str] = set()

    @torch.inference_mode()
    def states(self, pairs: Sequence[TextPair]) -> list[States | None]:
        """See `BranchEncoder`."""
        encoded = [self.encode(pair) for pair in pairs]
        kept = [triple for triple in encoded if min(len(triple[1]), len(triple[2])) > 0]
        if not kept:
            return [None] * len(pairs)
        prefixes, prefix_mask = _pad([prefix for prefix, _, _ in kept], left=True)
        prefixes, prefix_mask = prefixes.to(self.body.device), prefix_mask.to(self.body.device)
        positions = (prefix_mask.cumsum(1) - 1).clamp(min=0)
        cache = self.body(
            input_ids=prefixes, attention_mask=prefix_mask, position_ids=positions, use_cache=True
        ).past_key_values
        first = self._continue([a for _, a, _ in kept], prefix_mask, copy.deepcopy(cache))
        second = self._continue([b for _, _, b in kept], prefix_mask, cache)
        found = iter(zip(first, second, strict=True))
        return [next(found) if min(len(a), len(b)) > 0 else None for _, a, b in encoded]

    def encode(self, pair: TextPair) -> tuple[list[int], list[int], list[int]]:
        """Token ids of prompt, answer A and answer B, the answers cut to their common length."""
        prefix = self._render(pair.messages)
        a, b = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (pair.chosen, pair.rejected))
        length = min(len(a), len(b), self.max_tokens)
        if self.position_limit is not None:
            length = min(length, self.position_limit - len(prefix))
            if length <= 0 < min(len(a), len(b)):
                self._say_once(
                    "long", f"Prompts of {self.position_limit} or more tokens leave no room for an answer: skipped."
                )
        return prefix, a[: max(length, 0)], b[: max(length, 0)]

    def _render(self, messages: list[dict]) -> list[int]:
        if self.tokenizer.chat_template is None:
            self._say_once("template", "The tokenizer has no chat template; prompts are plain text with blank lines.")
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            return self.tokenizer(text)["input_ids"]
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError:
            if len(messages) < 2 or messages[0]["role"] != "system":
                raise
            self._say_once("system", "The chat template takes no system message; it is put in front of the question.")
            system, question = messages[0]["content"], messages[1]["content"]
            return self._render([{**messages[1], "content": f"{system}\n\n{question}"}, *messages[2:]])
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continue(self, branches: list[list[int]], prefix_mask: torch.Tensor, cache: Any) -> list[np.ndarray]:
        """States of one branch per row, behind the cached prefixes."""
        ids, mask = _pad(branches, left=False)
        ids, mask = ids.to(prefix_mask.device), mask.to(prefix_mask.device)
        positions = prefix_mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        if self.position_limit is not None:
            positions = positions.clamp(max=self.position_limit - 1)  # padding only; real positions fit
        output = self.body(
            input_ids=ids,
            attention_mask=torch.cat([prefix_mask, mask], dim=1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        states = output.last_hidden_state.float().cpu().numpy()
        return [row[: len(branch)] for row, branch in zip(states, branches, strict=True)]

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            say(message)


class ImageBranches:
    """Last hidden states of a FusedVLM's LLM at the visual tokens of two images under the same question.

    All m visual tokens of an image are one branch, so N = m for every pair. The text in front of the image is short
    and shared by construction; it is run with each branch.

    Args:
        model: `FusedVLMForConditionalGeneration`.
        processor: its processor.
        num_visual_tokens: m.
    """

    def __init__(self, model: PreTrainedModel, processor: "FusedVLMProcessor", num_visual_tokens: int) -> None:
        model.config.check_num_visual_tokens(num_visual_tokens)
        self.model, self.processor, self.max_tokens = model.eval(), processor, num_visual_tokens

    @torch.inference_mode()
    def states(self, pairs: Sequence[ImagePair]) -> list[States | None]:
        """See `BranchEncoder`; never None."""
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": pair.question}]}]
            for pair in pairs
            for image in (pair.image_a, pair.image_b)
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "num_visual_tokens": self.max_tokens},
        ).to(self.model.device)
        output = self.model.model(**inputs)
        states = output.last_hidden_state[inputs["input_ids"] == self.model.config.image_token_id]
        rows = states.float().cpu().numpy().reshape(len(pairs), 2, self.max_tokens, -1)
        return [(first, second) for first, second in rows]


def _pad(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) ids and mask; padding is masked, so its id is free and 0 exists in every vocabulary."""
    longest = max(len(row) for row in rows)
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return ids, mask

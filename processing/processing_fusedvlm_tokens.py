"""Pieces of a prompt to token ids, without any user text becoming a special token or a placeholder."""

from dataclasses import dataclass, field

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .processing_fusedvlm_prompt import Piece


@dataclass
class TokenRow:
    """One encoded prompt: ids, and whether each token is part of an answer (its end-of-turn token included)."""

    input_ids: list[int] = field(default_factory=list)
    is_answer: list[int] = field(default_factory=list)

    def add(self, ids: list[int], is_answer: bool = False) -> None:
        """Append tokens."""
        self.input_ids.extend(ids)
        self.is_answer.extend([int(is_answer)] * len(ids))


class TokenPieces:
    """Tokenise pieces one by one, as the published model does (reference section 4)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int):
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.special_ids = set(tokenizer.all_special_ids) - {image_token_id}

    def encode(self, pieces: list[Piece], sizes: dict[str, int], add_special_tokens: bool, sample: int) -> TokenRow:
        """Encode one prompt.

        Args:
            pieces: from `parse_prompt`.
            sizes: placeholders per "image" and "again" piece.
            add_special_tokens: wrap the prompt in the tokenizer's own special tokens (unmarked text).
            sample: number of the prompt, for messages.

        Raises:
            ValueError: when the text itself holds the placeholder token, or the prompt exceeds the LLM's context.
        """
        row = TokenRow()
        prefix, suffix = self._special_affixes() if add_special_tokens else ([], [])
        row.add(prefix)
        after_answer = False
        for piece in pieces:
            if piece.kind in sizes:
                row.add([self.image_token_id] * sizes[piece.kind])
            elif piece.kind == "text":
                ids = self._plain(piece.text)
                # The token that ends the assistant's turn is learned with the answer.
                ends_turn = after_answer and bool(ids) and ids[0] in self.special_ids
                row.add(ids[: int(ends_turn)], is_answer=True)
                row.add(ids[int(ends_turn) :])
                self._refuse_placeholder(ids, sample)
            else:
                row.add(self.literal(piece.text), is_answer=piece.kind == "answer")
            after_answer = piece.kind == "answer"
        row.add(suffix)
        limit = self.tokenizer.model_max_length
        if limit is not None and len(row.input_ids) > limit:
            visual = row.input_ids.count(self.image_token_id)
            raise ValueError(
                f"Sample {sample}: the prompt has {len(row.input_ids)} tokens, {visual} of them visual, but the language "
                f"model reads at most {limit}; shorten the text or lower num_visual_tokens."
            )
        return row

    def literal(self, text: str) -> list[int]:
        """Ids of text typed by a person: special tokens and the placeholder inside it stay plain text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if self.image_token_id in ids:
            token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            ids = []
            # Cut through the middle of the token, so that no tokenizer can put it back together.
            for number, part in enumerate(text.split(token)):
                for half in ([token[:1], token[1:]] if number else []) + ([part] if part else []):
                    ids += self.tokenizer(half, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [self._stand_in(token_id) for token_id in ids]

    def _stand_in(self, token_id: int) -> int:
        """A tokenizer whose unknown token is the placeholder maps unknown text to it; text must not become visual."""
        if token_id != self.image_token_id:
            return token_id
        stand_in = self.tokenizer.unk_token_id
        if stand_in in (None, self.image_token_id):
            stand_in = self.tokenizer.eos_token_id
        return stand_in

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _special_affixes(self) -> tuple[list[int], list[int]]:
        """Special tokens the tokenizer puts in front of and behind a text."""
        body = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(body) + 1):
            if full[start : start + len(body)] == body:
                return full[:start], full[start + len(body) :]
        return [], []

    def _refuse_placeholder(self, ids: list[int], sample: int) -> None:
        if self.image_token_id in ids:
            token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            raise ValueError(
                f"Sample {sample}: the text contains {token}, the language model's placeholder for visual tokens; mark "
                "images with <image>."
            )


def pad_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TokenRow],
    text_kwargs: dict,
    image_token_id: int,
    return_mm_token_type_ids: bool,
    return_assistant_mask: bool,
) -> dict:
    """Truncate and pad rows as the tokenizer would, with the per-token extras that were asked for.

    Raises:
        ValueError: when truncation would cut visual tokens.
    """
    max_length = text_kwargs.get("max_length")
    if text_kwargs.get("truncation") and max_length is not None:
        for sample, row in enumerate(rows):
            _truncate(row, max_length, image_token_id, sample)
    side = text_kwargs.get("padding_side") or tokenizer.padding_side
    padded = tokenizer.pad(
        {"input_ids": [row.input_ids for row in rows]},
        padding=text_kwargs.get("padding") or False,
        max_length=max_length,
        pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
        padding_side=side,
        return_attention_mask=True,
        verbose=False,
    )
    data = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
    if text_kwargs.get("return_token_type_ids"):
        data["token_type_ids"] = [[0] * len(ids) for ids in data["input_ids"]]
    if text_kwargs.get("return_attention_mask") is False:
        del data["attention_mask"]
    if return_mm_token_type_ids:
        data["mm_token_type_ids"] = [[int(i == image_token_id) for i in ids] for ids in data["input_ids"]]
    if return_assistant_mask:
        data["assistant_masks"] = [
            _pad(row.is_answer, len(ids), side) for row, ids in zip(rows, data["input_ids"], strict=True)
        ]
    return data


def _pad(values: list[int], length: int, side: str) -> list[int]:
    padding = [0] * (length - len(values))
    return padding + values if side == "left" else values + padding


def _truncate(row: TokenRow, max_length: int, image_token_id: int, sample: int) -> None:
    if image_token_id in row.input_ids[max_length:]:
        raise ValueError(
            f"Sample {sample}: cutting the prompt at max_length={max_length} would cut visual tokens; raise max_length, "
            "lower num_visual_tokens or turn truncation off."
        )
    del row.input_ids[max_length:], row.is_answer[max_length:]

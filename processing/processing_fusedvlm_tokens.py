"""Pieces of a prompt to token ids, without any user text becoming a special token or a placeholder."""

from dataclasses import dataclass, field

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .processing_fusedvlm_prompt import IMAGE, MARKERS, Piece


@dataclass
class TokenRow:
    """One encoded prompt: ids, and whether each token is part of an answer (its end-of-turn token included)."""

    input_ids: list[int] = field(default_factory=list)
    is_answer: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: list[int], is_answer: bool = False, offsets: list[tuple[int, int]] | None = None) -> None:
        """Append tokens; `offsets` are their places in the text with repeated markers, (0, 0) for what has none."""
        self.input_ids.extend(ids)
        self.is_answer.extend([int(is_answer)] * len(ids))
        self.offsets.extend(offsets if offsets is not None and len(offsets) == len(ids) else [(0, 0)] * len(ids))


class TokenPieces:
    """Tokenise pieces one by one, as the published model does, a whole batch at a time.

    As in fusedvlm's docs/reference.md, "Prompts".

    Args:
        tokenizer: the LLM's.
        image_token_id: placeholder of one visual token.
        prompts: pieces of every prompt of the batch; each distinct text is tokenised once.
        with_offsets: also keep the place of every token of plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        prompts: list[list[Piece]],
        with_offsets: bool = False,
    ):
        self.tokenizer = tokenizer
        self.with_offsets = with_offsets
        self.offsets: dict[str, list[tuple[int, int]]] = {}
        self.image_token_id = image_token_id
        self.special_ids = set(tokenizer.all_special_ids) - {image_token_id}
        pieces = [piece for prompt in prompts for piece in prompt]
        self.plain = self._tokenise({piece.text for piece in pieces if piece.kind in ("text", "end")}, literal=False)
        self.literal = self._tokenise({p.text for p in pieces if p.kind in ("question", "answer")}, literal=True)

    def _tokenise(self, texts: set[str], literal: bool) -> dict[str, list[int]]:
        ordered = sorted(texts)
        if not ordered:
            return {}
        kwargs = {"split_special_tokens": True} if literal else {}
        want_offsets = self.with_offsets and not literal
        encoded = self.tokenizer(
            ordered, add_special_tokens=False, verbose=False, return_offsets_mapping=want_offsets, **kwargs
        )
        if want_offsets:
            self.offsets = dict(zip(ordered, encoded["offset_mapping"], strict=True))
        ids = encoded["input_ids"]
        return {text: self._without_placeholder(text, row, **kwargs) for text, row in zip(ordered, ids, strict=True)}

    def encode(self, pieces: list[Piece], sizes: list[int], add_special_tokens: bool, sample: int) -> TokenRow:
        """Encode one prompt of the batch.

        Args:
            pieces: from `parse_prompt`.
            sizes: placeholders of every image marker, in order.
            add_special_tokens: wrap the prompt in the tokenizer's own special tokens (unmarked text).
            sample: number of the prompt, for messages.

        Raises:
            ValueError: when the prompt exceeds the LLM's context.
        """
        row = TokenRow()
        prefix, suffix = self._special_affixes() if add_special_tokens else ([], [])
        row.add(prefix)
        after_answer = False
        sizes_left = iter(sizes)
        gained = 0  # characters by which repeated markers have moved the text behind them
        for piece in pieces:
            start = piece.start + gained
            if piece.kind in MARKERS:
                size = next(sizes_left)
                places = [(start + number * len(IMAGE), start + (number + 1) * len(IMAGE)) for number in range(size)]
                row.add([self.image_token_id] * size, offsets=places)
                gained += size * len(IMAGE) - len(piece.text)
            elif piece.kind == "text":
                ids = self.plain[piece.text]
                # The token that ends the assistant's turn is learned with the answer.
                ends_turn = int(after_answer and bool(ids) and ids[0] in self.special_ids)
                offsets = [(start + first, start + last) for first, last in self.offsets.get(piece.text, [])]
                row.add(ids[:ends_turn], is_answer=True, offsets=offsets[:ends_turn])
                row.add(ids[ends_turn:], offsets=offsets[ends_turn:])
            elif piece.kind == "end":
                row.add(self.plain[piece.text], is_answer=True)
            else:
                row.add(self.literal[piece.text], is_answer=piece.kind == "answer")
            after_answer = piece.kind == "answer"
        row.add(suffix)
        self._refuse_too_long(row, sample)
        return row

    def _without_placeholder(self, text: str, ids: list[int], **kwargs) -> list[int]:
        """Only image markers become placeholders; the placeholder token inside text stays text."""
        if self.image_token_id not in ids:
            return ids
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        # Cut through the token, so that no tokenizer can put it back together.
        parts = text.replace(token, f"{token[:1]}\ue000{token[1:]}").split("\ue000")
        rows = self.tokenizer(parts, add_special_tokens=False, **kwargs)["input_ids"]
        return [self._stand_in(token_id) for row in rows for token_id in row]

    def _stand_in(self, token_id: int) -> int:
        """Where the placeholder is the tokenizer's unknown token, unknown text becomes another special token."""
        if token_id != self.image_token_id:
            return token_id
        unknown = self.tokenizer.unk_token_id
        return self.tokenizer.eos_token_id if unknown in (None, self.image_token_id) else unknown

    def _special_affixes(self) -> tuple[list[int], list[int]]:
        """Special tokens the tokenizer puts in front of and behind a text."""
        body = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(body) + 1):
            if full[start : start + len(body)] == body:
                return full[:start], full[start + len(body) :]
        return [], []

    def _refuse_too_long(self, row: TokenRow, sample: int) -> None:
        limit = self.tokenizer.model_max_length
        if limit is not None and len(row.input_ids) > limit:
            visual = row.input_ids.count(self.image_token_id)
            raise ValueError(
                f"Sample {sample}: the prompt has {len(row.input_ids)} tokens, {visual} of them visual, but the "
                f"language model reads at most {limit}; shorten the text or lower num_visual_tokens."
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
            _pad(row.is_answer, len(ids), side, 0) for row, ids in zip(rows, data["input_ids"], strict=True)
        ]
    if text_kwargs.get("return_offsets_mapping"):
        data["offset_mapping"] = [
            _pad(row.offsets, len(ids), side, (0, 0)) for row, ids in zip(rows, data["input_ids"], strict=True)
        ]
    return data


def _pad(values: list, length: int, side: str, filler) -> list:
    padding = [filler] * (length - len(values))
    return padding + values if side == "left" else values + padding


def _truncate(row: TokenRow, max_length: int, image_token_id: int, sample: int) -> None:
    if image_token_id in row.input_ids[max_length:]:
        raise ValueError(
            f"Sample {sample}: cutting the prompt at max_length={max_length} would cut visual tokens; raise "
            "max_length, lower num_visual_tokens or turn truncation off."
        )
    del row.input_ids[max_length:], row.is_answer[max_length:], row.offsets[max_length:]

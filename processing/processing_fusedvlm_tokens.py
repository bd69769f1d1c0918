"""Pieces of a prompt to token ids, without any user text becoming a special token or a placeholder."""

import re
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .processing_fusedvlm_prompt import IMAGE, MARKERS, Piece

# What control tokens look like: <tool_call>, [INST], <|im_end|>. Added tokens of white space or letters alone are text.
MARKUP = re.compile(r"<[^<>\s]*\w[^<>\s]*>|\[[^\[\]\s]*\w[^\[\]\s]*\]")


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


@dataclass
class Controls:
    """Control tokens of a tokenizer: those added without being special, all of them, where they may be, their ids."""

    size: int
    added: set[str]
    all: set[str]
    candidates: re.Pattern
    ids: set[int]


_CONTROLS: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> Controls; some have thousands of added tokens


def find_controls(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """Control tokens, remembered until the tokenizer gets further tokens."""
    known = _CONTROLS.get(tokenizer)
    if known is not None and known.size == len(tokenizer.added_tokens_decoder):
        return known
    special = {token for token in tokenizer.all_special_tokens if len(token) > 1}
    ids, added = set(tokenizer.all_special_ids), set()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special.add(token.content)
            ids.add(token_id)
        elif MARKUP.fullmatch(token.content):
            added.add(token.content)
            ids.add(token_id)
    others = sorted((token for token in special if not MARKUP.fullmatch(token)), key=len, reverse=True)
    candidates = re.compile("|".join([MARKUP.pattern, *map(re.escape, others)]))
    size = len(tokenizer.added_tokens_decoder)
    _CONTROLS[tokenizer] = Controls(size, added - special, added | special, candidates, ids)
    return _CONTROLS[tokenizer]


class TokenPieces:
    """Tokenize pieces one by one, as the published model does, a whole batch at a time.

    As in fusedvlm's docs/reference.md, "Prompts".

    Args:
        tokenizer: the LLM's.
        image_token_id: placeholder of one visual token.
        prompts: pieces of every prompt of the batch; each distinct text is tokenized once.
        with_offsets: also keep the place of every token of plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        prompts: list[list[Piece]],
        with_offsets: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.with_offsets = with_offsets
        self.offsets: dict[str, list[tuple[int, int]]] = {}
        self.image_token_id = image_token_id
        self.controls = find_controls(tokenizer)
        self.special_ids = self.controls.ids - {image_token_id}
        pieces = [piece for prompt in prompts for piece in prompt]
        plain = {part for p in pieces if p.kind in ("text", "end") for part in self._parts(p)}
        self.plain = self._tokenize(plain, literal=False)
        literal = {part for p in pieces if p.kind in ("question", "answer") for part in self._parts(p)}
        self.literal = self._tokenize(literal, literal=True)

    def _parts(self, piece: Piece) -> list[str]:
        """A piece, cut through every control token that stands in literal text, so that no tokenizer can read it.

        Tokenizers have a switch for special tokens, which questions and answers use, but none for tokens such as
        `<tool_call>` that are added without being special.
        """
        whole = piece.kind in ("question", "answer")
        cuts = [0]
        for start, stop in [(0, len(piece.text))] if whole else piece.literal:
            for match in self.controls.candidates.finditer(piece.text, start, stop):
                if match[0] in (self.controls.added if whole else self.controls.all):
                    cuts.append(match.start() + 1)
        return [piece.text[first:last] for first, last in zip(cuts, [*cuts[1:], len(piece.text)], strict=True)]

    def _ids(self, piece: Piece, table: dict[str, list[int]]) -> list[int]:
        return [token_id for part in self._parts(piece) for token_id in table[part]]

    def _places(self, piece: Piece, gained: int) -> list[tuple[int, int]]:
        """Where the tokens of a piece of text stand, `gained` characters further on."""
        found, before = [], 0
        for part in self._parts(piece):
            places = self.offsets.get(part, [])
            found += [(piece.place(before + a) + gained, piece.place(before + a) + gained + b - a) for a, b in places]
            before += len(part)
        return found

    def _num_ending(self, ids: list[int]) -> int:
        """How many tokens behind an answer end its turn: a control token, or the eos behind white space."""
        first = next((number for number, token_id in enumerate(ids) if token_id in self.special_ids), None)
        if first is None or first == 0:
            return 0 if first is None else 1
        is_eos = ids[first] == self.tokenizer.eos_token_id
        return first + 1 if is_eos and not str(self.tokenizer.decode(ids[:first])).strip() else 0

    def _tokenize(self, texts: set[str], literal: bool) -> dict[str, list[int]]:
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
                ids, offsets = self._ids(piece, self.plain), self._places(piece, gained)
                # The token that ends the assistant's turn is learned with the answer.
                ends_turn = self._num_ending(ids) if after_answer else 0
                row.add(ids[:ends_turn], is_answer=True, offsets=offsets[:ends_turn])
                row.add(ids[ends_turn:], offsets=offsets[ends_turn:])
            elif piece.kind == "end":
                row.add(self._ids(piece, self.plain), is_answer=True)
            else:
                row.add(self._ids(piece, self.literal), is_answer=piece.kind == "answer")
            after_answer = piece.kind == "answer"
        row.add(suffix)
        self._refuse_too_long(row, sample)
        return row

    def _without_placeholder(self, text: str, ids: list[int], **kwargs: Any) -> list[int]:
        """Only image markers become placeholders; the placeholder token inside text stays text."""
        if self.image_token_id not in ids:
            return ids
        token = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
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
        ValueError: when truncation would cut visual tokens, and when rows of several lengths shall be one tensor.
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
    lengths = sorted({len(ids) for ids in padded["input_ids"]})
    if text_kwargs.get("return_tensors") and len(lengths) > 1:
        raise ValueError(
            f"The {len(rows)} prompts have {lengths[0]} to {lengths[-1]} tokens, and a tensor has rows of one length: "
            'pass padding=True (with apply_chat_template: processor_kwargs={"padding": True}).'
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


def _pad(values: list, length: int, side: str, filler: Any) -> list:
    padding = [filler] * (length - len(values))
    return padding + values if side == "left" else values + padding


def _truncate(row: TokenRow, max_length: int, image_token_id: int, sample: int) -> None:
    if image_token_id in row.input_ids[max_length:]:
        raise ValueError(
            f"Sample {sample}: cutting the prompt at max_length={max_length} would cut visual tokens; raise "
            "max_length, lower num_visual_tokens or turn truncation off."
        )
    del row.input_ids[max_length:], row.is_answer[max_length:], row.offsets[max_length:]

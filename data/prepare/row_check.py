"""Can a row be trained on? One answer for the collators that build batches and for `fusedvlm data check`.

A row is untrainable when its conversation is malformed, has no answer, asks nothing about its image, shows an image
that cannot be opened, or is longer than the language model reads. Long rows can be cut: whole turns from the end first,
then the end of the last answer that is left, whose end-of-turn token is then not learned.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from fusedvlm.data.records import as_parts, normalize_sample, text_of
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image

Overlong = Literal["drop", "truncate"]
MALFORMED, NO_ANSWER, EMPTY_ANSWER = "malformed conversation", "no answer", "empty answer"
EMPTY_QUESTION, BAD_IMAGE = "empty question", "image cannot be used"
TOO_LONG, NOTHING_LEFT = "too long", "too long, and cutting leaves no answer"
SHOWN_IDS = 5


class UntrainableRow(ValueError):
    """A row that cannot be learned from; `reason` is one of a few, the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class RowLimits:
    """How long a row may be, and what happens to longer ones.

    Args:
        max_length: tokens of the language model's prompt, visual ones included; what the model reads at most when None
            or larger than that.
        overlong: drop, or truncate answers.

    Raises:
        ValueError: for a length below 1 and an unknown choice.
    """

    max_length: int | None = None
    overlong: Overlong = "drop"

    def __post_init__(self) -> None:
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 1):
            raise ValueError(f"max_length={self.max_length} must be a whole number of tokens from 1, e.g. 4096.")
        if self.overlong not in ("drop", "truncate"):
            raise ValueError(f"overlong={self.overlong!r} must be drop or truncate.")

    def tokens(self, processor: Any) -> float:
        """Most tokens of a row."""
        reads = processor.tokenizer.model_max_length
        return min(math.inf if reads is None else reads, self.max_length or math.inf)


@dataclass
class CheckedRow:
    """A row that can be trained on: its messages and images after cutting, its tokens, and whether it was cut."""

    sample: dict[str, Any]
    length: int
    was_cut: bool = False


class RowChecker:
    """Tells whether rows can be trained on.

    Args:
        processor: a `FusedVLMProcessor`; None leaves out everything that depends on tokens, and lengths are in words.
        limits: see `RowLimits`.
        num_visual_tokens, num_followup_visual_tokens: m and m' that rows are built at; by default the processor's.
    """

    def __init__(
        self,
        processor: Any,
        limits: RowLimits = RowLimits(),
        num_visual_tokens: int | None = None,
        num_followup_visual_tokens: int | None = None,
    ) -> None:
        self.processor, self.limits = processor, limits
        self.counts = {
            "num_visual_tokens": num_visual_tokens,
            "num_followup_visual_tokens": num_followup_visual_tokens,
        }

    def check(self, sample: dict[str, Any], open_images: bool = True) -> CheckedRow:
        """The row as it can be trained on.

        Args:
            sample: of the conversation format.
            open_images: look at the images too.

        Raises:
            UntrainableRow: with the reason.
        """
        try:
            row = normalize_sample(sample)
        except ValueError as error:
            raise UntrainableRow(MALFORMED, str(error).removeprefix("Sample 0: ")) from None
        refuse_untaught(row["messages"])
        if open_images:
            for image in row["images"]:
                refuse_bad_image(image)
        if "problem" in sample:  # of a cache that could not read the row's images
            raise UntrainableRow(BAD_IMAGE, sample["problem"])
        if self.processor is None:
            words = sum(len(text_of(message).split()) for message in row["messages"])
            return CheckedRow(row, words)
        length, _ = self.encode(row["messages"])
        limit = self.limits.tokens(self.processor)
        if length <= limit:
            return CheckedRow(row, length)
        if self.limits.overlong == "drop":
            raise UntrainableRow(TOO_LONG, f"{length} tokens, more than {limit:g}")
        return self.cut(row, int(limit))

    def encode(self, messages: list[dict]) -> tuple[int, list[int]]:
        """Tokens of a conversation, however many, and where each of its answers begins.

        Raises:
            UntrainableRow: when the processor refuses it.
        """
        try:
            text = self.processor.apply_chat_template(messages, tokenize=False)
            with unlimited(self.processor.tokenizer):
                encoded = self.processor.encode_prompts(
                    text=[text], padding=False, return_assistant_tokens_mask=True, **self.counts
                )
        except ValueError as error:
            raise UntrainableRow(MALFORMED, str(error).removeprefix("Sample 0: ")) from None
        mask = encoded["assistant_masks"][0]
        starts = [place for place, own in enumerate(mask) if own and not (place and mask[place - 1])]
        return len(mask), starts

    def cut(self, row: dict[str, Any], limit: int) -> CheckedRow:
        """The row up to the last answer of which something fits into `limit` tokens.

        Raises:
            UntrainableRow: when no answer does.
        """
        length, starts = self.encode(row["messages"])
        ends = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if len(starts) == len(ends):  # one look in place of one per turn
            ends = [end for end, start in zip(ends, starts, strict=True) if start < limit]
        for end in reversed(ends):
            messages = row["messages"][: end + 1]
            kept, own_starts = self.encode(messages)
            if own_starts and own_starts[-1] < limit:
                shown = sum(part["type"] == "image" for message in messages for part in message["content"])
                sample = {"images": row["images"][:shown], "messages": messages}
                return CheckedRow(sample, min(kept, limit), was_cut=True)
        raise UntrainableRow(NOTHING_LEFT, f"{length} tokens, and no answer begins in the first {limit}")


def refuse_untaught(messages: list[dict]) -> None:
    """Refuse conversations without answers, with empty ones, or that ask nothing about their image.

    Raises:
        UntrainableRow: with the reason.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise UntrainableRow(NO_ANSWER, "no message of the assistant")
    has_image, turn = False, 0
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not text_of(message).strip():
            raise UntrainableRow(EMPTY_ANSWER, f"message {number} of the assistant is empty")
        if message["role"] != "user":
            continue
        has_image = has_image or any(part["type"] == "image" for part in as_parts(message["content"]))
        if has_image and not text_of(message).strip():
            raise UntrainableRow(EMPTY_QUESTION, f"question {turn} asks nothing about its image")
        turn += 1


def refuse_bad_image(image: Any) -> None:
    """Open an image to its last pixel.

    Raises:
        UntrainableRow: naming the image.
    """
    try:
        load_image(image)
    except (ValueError, OSError) as error:
        raise UntrainableRow(BAD_IMAGE, str(error)) from None


@contextmanager
def unlimited(tokenizer: Any) -> Iterator[None]:
    """Let a tokenizer encode more than its model reads, to see how much that is."""
    limit = tokenizer.model_max_length
    tokenizer.model_max_length = 10**30
    try:
        yield
    finally:
        tokenizer.model_max_length = limit


@dataclass
class RowReport:
    """What was found about many rows: counts by reason with the first ids of each, and lengths."""

    unit: str = "tokens"
    rows: int = 0
    cut: int = 0
    reasons: Counter = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    lengths: Counter = field(default_factory=Counter)

    def add(self, checker: RowChecker, sample: dict[str, Any], open_images: bool = False) -> bool:
        """Look at one more row; True when it can be trained on."""
        self.rows += 1
        try:
            row = checker.check(sample, open_images)
        except UntrainableRow as error:
            self.reasons[error.reason] += 1
            shown = self.first.setdefault(error.reason, [])
            if len(shown) < SHOWN_IDS:
                shown.append(f"{sample.get('id', '?')}: {error}")
            return False
        self.cut += row.was_cut
        self.lengths[row.length] += 1
        return True

    def histogram(self) -> list[dict[str, int]]:
        """Rows by length in bins that double: `{"from", "to", "rows"}`, the upper end not included."""
        if not self.lengths:
            return []
        last = max(1, math.ceil(math.log2(max(self.lengths) + 1)))
        edges = [0, *(2**power for power in range(4, max(last, 4) + 1))]
        counts = [
            sum(count for length, count in self.lengths.items() if low <= length < high)
            for low, high in pairwise(edges)
        ]
        return [
            {"from": low, "to": high, "rows": count}
            for (low, high), count in zip(pairwise(edges), counts, strict=True)
            if count
        ]

    def quantile(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        wanted, seen = share * sum(self.lengths.values()), 0
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            if seen >= wanted:
                return length
        return 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rows": self.rows,
            "untrainable": dict(sorted(self.reasons.items())),
            "first": self.first,
            "cut": self.cut,
            "unit": self.unit,
            "lengths": {f"p{int(100 * share)}": self.quantile(share) for share in (0.5, 0.95, 0.99, 1.0)},
            "histogram": self.histogram(),
        }

    def lines(self) -> list[str]:
        """The report for a terminal."""
        found = self.histogram()
        most = max((entry["rows"] for entry in found), default=1)
        shown = [f"rows by length in {self.unit}:"] if found else []
        shown += [
            f"  {entry['from']:>7} to {entry['to'] - 1:<7} {entry['rows']:>9}  "
            + "#" * math.ceil(40 * entry["rows"] / most)
            for entry in found
        ]
        if found:
            shown.append(
                f"  half have at most {self.quantile(0.5)}, 99 % at most {self.quantile(0.99)}, "
                f"the longest {self.quantile(1)}"
            )
        for reason, count in sorted(self.reasons.items()):
            shown.append(f"untrainable, {reason}: {count}, e.g. {'; '.join(self.first[reason][:2])}")
        if self.cut:
            shown.append(f"cut to the limit: {self.cut}")
        return shown

"""Conversations to training batches: right-padded, answers labeled, answers tokenized for stage 1."""

import json
from typing import TYPE_CHECKING, Any

import torch

from fusedvlm.data.prepare.row_check import Overlong, RowChecker, RowLimits, UntrainableRow, refuse_untaught, unlimited
from fusedvlm.data.records import answers_per_segment, normalize_sample
from fusedvlm.processing import exactly_as_asked

if TYPE_CHECKING:
    from fusedvlm.processing import FusedVLMProcessor

IGNORED = -100
# Stands in for a batch of which no row can be trained on; nothing of it is learned.
PLACEHOLDER = {"messages": [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]}


class ConversationCollator:
    """Batch samples of the conversation format (see `fusedvlm.data.records`).

    Labels are set on answer tokens and the eos that ends each answer, nothing else (docs/reference.md, "Labels").

    Args:
        processor: `FusedVLMProcessor`.
        num_visual_tokens, num_followup_visual_tokens: m and m'; by default the processor's.
        with_answers: also tokenize each question's answer for the answer tower of stage 1.
        max_answer_length: tokens of an answer, eos included; longer ones are cut in front of the eos.
        with_ids: also return `sample_ids` (B, bytes), the samples' "id" entries; our trainers name them when a loss is
            not finite, other trainers would hand them to the model.
        max_length, overlong: see `fusedvlm.data.prepare.row_check.RowLimits`; by default rows beyond what the LLM reads
            are refused.
        skip_untrainable: leave rows that cannot be trained on out of the batch and list them in `skipped_rows`
            (n, bytes), JSON with id, source, reason and detail, for trainers that count them. A batch of which nothing
            is left holds one row without images and labels.

    Raises:
        ValueError: on call, naming the sample that cannot be trained on, unless it is skipped.
    """

    def __init__(
        self,
        processor: "FusedVLMProcessor",
        num_visual_tokens: int | None = None,
        num_followup_visual_tokens: int | None = None,
        with_answers: bool = False,
        max_answer_length: int = 77,
        with_ids: bool = False,
        max_length: int | None = None,
        overlong: Overlong = "drop",
        skip_untrainable: bool = False,
    ) -> None:
        self.processor = processor
        self.checker = RowChecker(
            processor, RowLimits(max_length, overlong), num_visual_tokens, num_followup_visual_tokens
        )
        self.skip_untrainable = skip_untrainable
        self.num_visual_tokens = num_visual_tokens
        self.num_followup_visual_tokens = num_followup_visual_tokens
        self.with_answers = with_answers
        self.max_answer_length = max_answer_length
        self.with_ids = with_ids

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples to tensors; keys as in the processor's layout, plus `labels` (B, L)."""
        samples = [with_views(sample) for sample in samples]
        limit = self.checker.limits.tokens(self.processor)
        try:
            checked = [normalize_sample(sample, index) for index, sample in enumerate(samples)]
            for sample, row in zip(samples, checked, strict=True):
                if "problem" in sample:
                    raise ValueError(sample["problem"])
                refuse_untaught(row["messages"])
            batch = self._encode(checked, is_cached=any("view_features" in sample for sample in samples))
            if batch["input_ids"].shape[1] <= limit:
                return self._with_ids(batch, samples, [])
            problem = None
        except ValueError as error:  # one row is wrong: which?
            problem = error
        kept, checked, skipped = self._sort_out(samples)
        try:
            return self._with_ids(self._encode_cut(checked, samples, int(min(limit, 10**9))), kept, skipped)
        except ValueError as error:  # no row alone is at fault
            raise problem or error from None

    def _sort_out(self, samples: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
        """Rows one by one: samples that can be trained on, the same normalized and cut, and why others cannot.

        Raises:
            ValueError: naming the first of the others, when they are not skipped.
        """
        kept, checked, skipped = [], [], []
        for index, sample in enumerate(samples):
            try:
                row = self.checker.check(sample, open_images="view_features" not in sample)
                if self.with_answers:
                    answers_per_segment(row.sample["messages"])
                self._encode_images(row.sample, sample)
            except ValueError as error:
                name = str(sample.get("id") or f"Sample {index}")
                if not self.skip_untrainable:
                    raise ValueError(f"{name[:1].upper()}{name[1:]}: {error}") from None
                reason = error.reason if isinstance(error, UntrainableRow) else "refused by the processor"
                source = str(sample.get("source", ""))
                skipped.append({"id": name, "source": source, "reason": reason, "detail": str(error)[:300]})
                continue
            kept.append(sample)
            checked.append(row.sample)
        return kept, checked, skipped

    def _encode_images(self, row: dict, sample: dict) -> None:
        """Refuse images that open but cannot be cut into views."""
        if row["images"] and "view_features" not in sample:
            self.processor.image_processor(list(row["images"]), return_tensors="pt")

    def _encode_cut(self, checked: list[dict], samples: list[dict], limit: int) -> dict[str, torch.Tensor]:
        """The batch of rows that were checked, each cut to `limit` tokens."""
        is_empty = not checked
        with unlimited(self.processor.tokenizer):
            batch = self._encode(
                checked or [normalize_sample(PLACEHOLDER)], any("view_features" in sample for sample in samples)
            )
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name] = batch[name][:, :limit]
        if is_empty:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch

    def _with_ids(self, batch: dict, kept: list[dict], skipped: list[dict]) -> dict[str, torch.Tensor]:
        if self.with_ids:
            batch["sample_ids"] = encode_ids([sample.get("id", "") for sample in kept] or [""])
        if skipped:
            batch["skipped_rows"] = encode_ids([json.dumps(entry) for entry in skipped])
        return batch

    def _encode(self, checked: list[dict], is_cached: bool) -> dict[str, torch.Tensor]:
        texts = [self.processor.apply_chat_template(sample["messages"], tokenize=False) for sample in checked]
        kwargs: dict[str, Any] = {
            "text": texts,
            "num_visual_tokens": self.num_visual_tokens,
            "num_followup_visual_tokens": self.num_followup_visual_tokens,
            "padding": True,
            "padding_side": "right",
            "return_tensors": "pt",
            "return_assistant_tokens_mask": True,
            **exactly_as_asked(self.processor),
        }
        if is_cached:
            features = [torch.as_tensor(views) for sample in checked for views in sample["images"]]
            views = [len(image) for image in features]
            batch = dict(self.processor.encode_prompts(image_num_views=views, **kwargs))
            if features:
                batch["view_features"] = torch.cat(features)
                batch["image_num_views"] = torch.tensor(views)
        else:
            images = [sample["images"] for sample in checked]
            batch = dict(self.processor(images=images if any(images) else None, **kwargs))
        is_answer = batch.pop("assistant_masks").bool()
        batch["labels"] = torch.where(is_answer, batch["input_ids"], IGNORED)
        if self.with_answers:
            batch.update(self._tokenize_answers(checked))
        return batch

    def _tokenize_answers(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Answers in segment order, each ended by an eos, right-padded (docs/reference.md, "Stage 1")."""
        tokenizer = self.processor.query_tokenizer
        answers = [answer for sample in samples for answer in answers_per_segment(sample["messages"])]
        if not answers:  # a batch without images has no pairs; other ranks may have some
            nothing = torch.zeros(0, 1, dtype=torch.long)
            return {"answer_input_ids": nothing, "answer_attention_mask": nothing}
        encoded = tokenizer(answers, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        rows = [torch.tensor([*ids[: self.max_answer_length - 1], tokenizer.eos_token_id]) for ids in encoded]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "answer_input_ids": pad(rows, batch_first=True, padding_value=tokenizer.eos_token_id),
            "answer_attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        }


def with_views(sample: dict) -> dict:
    """The sample with its view tokens, one tensor or one per image, in place of images where it has some."""
    views = sample.get("view_features")
    if views is None:
        return sample
    return {**sample, "images": list(views) if isinstance(views, (list, tuple)) else [views]}


def encode_ids(ids: list) -> torch.Tensor:
    """Ids of any type as (B, bytes) UTF-8 text, padded with zeros: tensors are all that loaders and ranks exchange."""
    rows = [torch.frombuffer(bytearray(str(one).encode() or b"\0"), dtype=torch.uint8) for one in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def decode_ids(ids: torch.Tensor) -> list[str]:
    """What `encode_ids` was given, as text."""
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in ids]

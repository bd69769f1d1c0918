"""Ask a model many questions by free greedy decoding, and time it."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusedvlm.processing import exactly_as_asked

from .results import Latency, TaskScore

if TYPE_CHECKING:
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
    from fusedvlm.processing import FusedVLMProcessor


@torch.no_grad()
def answer_questions(
    model: "FusedVLMForConditionalGeneration",
    processor: "FusedVLMProcessor",
    questions: Sequence[str],
    num_visual_tokens: int,
    images: Sequence | None = None,
    view_features: torch.Tensor | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda count: None,
    histories: Sequence[Sequence[tuple[str, str]]] | None = None,
    num_followup_visual_tokens: int | None = None,
) -> list[str]:
    """Answer one question per image, at once or behind earlier questions about it.

    Args:
        model, processor: a variant.
        questions: one per image.
        num_visual_tokens: m.
        images: whatever the processor takes, or
        view_features: (images, views, tokens per view, width) computed beforehand, same number of views each.
        max_new_tokens: cap of an answer.
        batch_size: questions decoded together.
        on_batch: called with the number of questions just answered.
        histories: per image the questions before this one, each with the answer it was given.
        num_followup_visual_tokens: m' of every question after an image's first; the processor's when not given.

    Raises:
        ValueError: when neither or both of images and view_features are given.
    """
    if (images is None) == (view_features is None):
        raise ValueError("Give exactly one of images and view_features.")
    model.eval()
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        earlier = [()] * len(questions[part]) if histories is None else histories[part]
        messages = [
            conversation([*history, (question, None)])
            for history, question in zip(earlier, questions[part], strict=True)
        ]
        texts = [processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
        kwargs: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        kwargs["num_visual_tokens"] = num_visual_tokens
        if num_followup_visual_tokens is not None:
            kwargs["num_followup_visual_tokens"] = num_followup_visual_tokens
        kwargs.update(exactly_as_asked(processor))
        if images is not None:
            kwargs["images"] = [[image] for image in images[part]]
            inputs = dict(processor(**kwargs).to(model.device))
        elif view_features is not None:
            views = view_features[part]
            encoded = processor.encode_prompts(image_num_views=[views.shape[1]] * len(views), **kwargs)
            inputs = _with_cached_views(model, encoded.to(model.device), views)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        on_batch(len(texts))
    return answers


def conversation(turns: Sequence[tuple[str, str | None]]) -> list[dict]:
    """Questions about one image and their answers as messages; the last question has none yet."""
    messages: list[dict] = []
    for number, (question, answer) in enumerate(turns):
        content = ([{"type": "image"}] if number == 0 else []) + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _with_cached_views(model: "FusedVLMForConditionalGeneration", inputs: Any, views: torch.Tensor) -> dict:
    """Replace the image side of a batch by visual tokens fused from cached views."""
    inputs = dict(inputs)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    counts = torch.full((len(views),), views.shape[1])
    features = model.get_image_features(
        view_features=views.flatten(0, 1).float().to(model.device), image_num_views=counts, return_dict=True, **inputs
    )
    return {**text, "mm_encoder_outputs": {"image": features}}


def summarize(task: str, num_visual_tokens: int, scores: Sequence[float]) -> TaskScore:
    """Mean and standard error of per-question scores. Raises `ValueError` for an empty list."""
    if not len(scores):
        raise ValueError(f"No questions were asked for task {task!r} at m={num_visual_tokens}.")
    values = np.asarray(scores, dtype=np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return TaskScore(task, num_visual_tokens, float(values.mean()), len(values), error)


@torch.no_grad()
def measure_latencies(
    model: "FusedVLMForConditionalGeneration",
    processor: "FusedVLMProcessor",
    image: Any,
    question: str,
    counts: Sequence[int],
    max_new_tokens: int = 8,
    repeats: int = 7,
) -> list[Latency]:
    """Median wall-clock time of one question about one image, pixels to text, at several m.

    The m take turns, after one warm-up each, so that whatever else the machine does slows all of them alike.

    Args:
        counts: numbers of visual tokens.
        max_new_tokens: tokens of the whole answer, always all of them.
        repeats: rounds.
    """
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]

    def ask(m: int, tokens: int) -> float:
        started = time.perf_counter()
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"num_visual_tokens": m, **exactly_as_asked(processor)},
        ).to(model.device)
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for m in counts:
        ask(m, max_new_tokens)
    rounds = [[(ask(m, 1), ask(m, max_new_tokens)) for m in counts] for _ in range(repeats)]
    return [
        Latency(m, statistics.median(first), statistics.median(whole), repeats)
        for m, measured in zip(counts, zip(*rounds, strict=True), strict=True)
        for first, whole in [zip(*measured, strict=True)]
    ]

"""Answers, FLOPs and latency of one entrant at one m, over held-out images nobody trained on."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from fusedvlm.costs.environment import load_average
from fusedvlm.evaluation import answer_questions, describe_environment
from fusedvlm.quickstart import world
from fusedvlm.reducers import ReducedDense

from .cells import DENSE, Cell
from .entrants import Entrant
from .equal_training import TrainingRecord
from .flop_account import count_question
from .plan import Plan
from .shared_world import SharedWorld, normalize

if TYPE_CHECKING:
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
    from fusedvlm.processing import FusedVLMProcessor

TOKENS_OF_ANSWER = {True: 50, False: 3}


def measure_cell(
    entrant: Entrant,
    model: "FusedVLMForConditionalGeneration",
    processor: "FusedVLMProcessor",
    shared: SharedWorld,
    plan: Plan,
    num_visual_tokens: int,
    seed: int,
    training: TrainingRecord,
    command: str,
) -> Cell:
    """Score every task by free greedy decoding, count one question, time it."""
    model.eval().requires_grad_(False)  # torch counts no module that is given a parameter which could learn
    reduced = ReducedDense(model, entrant.reducer, num_visual_tokens) if entrant.reducer else None
    scores = {}
    for task, asked in shared.questions.items():
        numbers = [number for number, _ in asked]
        texts = [question.text for _, question in asked]
        limit = TOKENS_OF_ANSWER[task in DENSE]
        if reduced is None:
            views = shared.view_tokens(model, "held_out")[numbers][:, None]
            answers = answer_questions(
                model, processor, texts, num_visual_tokens, view_features=views, max_new_tokens=limit, batch_size=128
            )
        else:
            answers = _answer_reduced(reduced, processor, texts, shared.held_out_pixels[numbers], limit)
        scores[task] = [world.score(task, said, q.answer) for said, (_, q) in zip(answers, asked, strict=True)]
    first_token = _first_token(model, processor, reduced, shared, num_visual_tokens)
    return Cell(
        entrant=entrant.key,
        num_visual_tokens=num_visual_tokens,
        seed=seed,
        scores=scores,
        flops=asdict(count_question(model, first_token)),
        latency_ms=_latency(first_token, plan.latency_repeats, model.device.type == "cuda"),
        training=training.record(),
        environment={**asdict(describe_environment(command)), "load": load_average()},
    )


def _prompts(
    processor: "FusedVLMProcessor", texts: list[str], num_visual_tokens: int, device: torch.device | str
) -> dict:
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    rendered = [processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    encoded = processor.encode_prompts(
        text=rendered,
        image_num_views=[1] * len(texts),
        padding=True,
        num_visual_tokens=num_visual_tokens,
        return_tensors="pt",
    )
    return dict(encoded.to(device))


def _answer_reduced(
    reduced: ReducedDense, processor: "FusedVLMProcessor", texts: list[str], pixels: torch.Tensor, limit: int
) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(texts), 128):
        part = slice(start, start + 128)
        inputs = _prompts(processor, texts[part], reduced.num_patches, reduced.model.device)
        views = normalize(pixels[part]).to(reduced.model.device)
        output = reduced.generate(**inputs, pixel_values=views, max_new_tokens=limit, do_sample=False)
        answers += [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    return answers


def _first_token(
    model: "FusedVLMForConditionalGeneration",
    processor: "FusedVLMProcessor",
    reduced: ReducedDense | None,
    shared: SharedWorld,
    m: int,
) -> Callable[[], object]:
    """One question about one image, from normalized pixels to the logits of the first token of its answer."""
    number, question = shared.questions["colour"][0]
    own = m if reduced is None else reduced.num_patches
    inputs = _prompts(processor, [question.text], own, model.device)
    inputs["pixel_values"] = normalize(shared.held_out_pixels[number : number + 1]).to(model.device)
    ask = model if reduced is None else reduced

    def work() -> object:
        with torch.no_grad():
            return ask(**inputs, logits_to_keep=1)

    return work


def _latency(work: Callable[[], object], repeats: int, on_gpu: bool) -> dict[str, float]:
    """Median and quartiles in milliseconds, after two runs that do not count.

    On a CPU with one thread that thread's own time is taken: what the clock would show were nobody else at work.
    """
    own = not on_gpu and torch.get_num_threads() == 1
    clock, times = time.thread_time if own else time.perf_counter, []
    for _ in range(repeats + 2):
        started = clock()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (clock() - started))
    low, median, high = np.quantile(times[2:], [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high), "repeats": float(repeats)}

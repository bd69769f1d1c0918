"""Latency and memory at every m, one question at a time, as the paper measures them: over 500 pictures, pixels to text.

The m take turns on every picture, so that whatever else the machine does slows all of them alike.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from fusedvlm.console import progress
from fusedvlm.evaluation.results import Latency
from fusedvlm.evaluation.tasks.task import Task
from fusedvlm.processing import exactly_as_asked
from fusedvlm.serving.chat import VisualChat, user_message

from .view_store import read_picture

PICTURES = 500  # of the paper
NEW_TOKENS = 32  # of every answer, always all of them


def measure(
    chat: VisualChat, task: Task, counts: Sequence[int], pictures: int = PICTURES, new_tokens: int = NEW_TOKENS
) -> list[Latency]:
    """Medians over the first questions of a task that show pictures.

    Args:
        chat: the variant.
        task: gives pictures and prompts.
        counts: numbers of visual tokens.
        pictures: how many questions; fewer where the task has fewer.
        new_tokens: of an answer.

    Returns:
        Per m: time to the first token, to the whole answer, tokens per second behind the first, the accelerator's peak
        memory and how busy it was (both None on a CPU).

    Raises:
        ValueError: for a task without pictures.
    """
    records = list(islice((record for record in task.records() if record.images), pictures))
    if not records:
        raise ValueError(f"--measure: {task.name} shows no pictures.")
    gauge = Gauge(chat.model.device)
    firsts, wholes, busy = defaultdict(list), defaultdict(list), defaultdict(list)
    peaks: dict[int, int] = defaultdict(int)
    for number, record in enumerate(progress(records, description="measuring", unit=" pictures")):
        pixels = [read_picture(image) for image in record.images]
        for m in counts:
            ask = _asker(chat, [user_message(pixels, task.prompt(record))], m)
            if number == 0:
                ask(new_tokens)  # warm-up
            gauge.start()
            firsts[m].append(ask(1))
            wholes[m].append(ask(new_tokens))
            peaks[m] = max(peaks[m], gauge.peak())
            busy[m].append(gauge.utilization())
    return [
        Latency(
            m,
            statistics.median(firsts[m]),
            statistics.median(wholes[m]),
            len(records),
            peaks[m] or None,
            (new_tokens - 1) / max(1e-9, statistics.median(wholes[m]) - statistics.median(firsts[m])),
            statistics.mean(share for share in busy[m] if share is not None) if None not in busy[m] else None,
        )
        for m in counts
    ]


def _asker(chat: VisualChat, messages: list[dict[str, Any]], m: int) -> Callable[[int], float]:
    @torch.inference_mode()
    def ask(tokens: int) -> float:
        started = time.perf_counter()
        inputs = chat.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"num_visual_tokens": m, **exactly_as_asked(chat.processor)},
        ).to(chat.model.device)
        chat.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        if chat.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return ask


class Gauge:
    """The accelerator's peak memory and use between `start` and asking; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None

    def start(self) -> None:
        """Begin anew."""
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes."""
        return 0 if self.device is None else torch.cuda.max_memory_allocated(self.device)

    def utilization(self) -> float | None:
        """Share of the last moments in which the accelerator computed; None where nobody says."""
        if self.device is None:
            return None
        try:
            return torch.cuda.utilization(self.device) / 100
        except (ModuleNotFoundError, RuntimeError):  # needs NVIDIA's own library
            return None

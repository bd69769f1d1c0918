"""A whole divergence measurement: load the model, stream the pairs, accumulate, summarize."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fusedvlm.modeling_fusedvlm  # noqa: F401 - registers the model type
from fusedvlm.console import progress, say
from fusedvlm.serving import VisualChat

from .accumulate import Progress, StateFile, accumulate, gather
from .branches import BranchEncoder, ImageBranches, TextBranches
from .estimators import DivergenceResult, DivergenceStatistics, summarize
from .pairs import local_folder, read_pair, stream_rows


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    model: str
    dataset: str
    split: str = "train"
    revision: str | None = None
    dataset_revision: str | None = None
    limit: int | None = None
    max_tokens: int = 800
    batch_size: int = 4
    beta: float = 1.0
    reading: str = "mean"
    min_pairs: int = 1
    state: Path | None = None
    dtype: str = "auto"
    device: str | None = None

    def identity(self, processes: int) -> dict:
        """What decides the numbers, so that a state file of another measurement is refused."""
        names = ("model", "dataset", "split", "revision", "dataset_revision", "max_tokens", "batch_size", "reading")
        return {**{name: getattr(self, name) for name in (*names, "dtype")}, "processes": processes}


def measure_divergence(request: Request) -> tuple[dict[str, Any], DivergenceResult] | None:
    """The record of a measurement and its result; None on all processes but the main one of several.

    Raises:
        ValueError: for data or a model that cannot be read as asked.
    """
    processes = PartialState(cpu=request.device == "cpu")
    encoder, images = load_encoder(request, processes.device)
    statistics = DivergenceStatistics(encoder.max_tokens, request.reading)
    state = StateFile(_state_path(request.state, processes), request.identity(processes.num_processes))
    done = gather(_measure(request, encoder, images, state.load(statistics), state, processes))
    if not processes.is_main_process:
        return None
    if done.skipped:
        say(f"{done.skipped} of {done.done} pairs have a branch without tokens and were skipped.")
    if done.statistics.count[0] == 0:
        raise ValueError(f"{request.dataset}: {done.done} rows read, none of them a pair with tokens in both branches.")
    result = summarize(done.statistics, request.beta, request.min_pairs)
    facts = {"model": request.model, "dataset": request.dataset, "images": images, "skipped": done.skipped}
    return {**facts, **result.record()}, result


def load_encoder(request: Request, device: torch.device) -> tuple[BranchEncoder, bool]:
    """Model and tokenizer or processor; also whether its pairs are images.

    Raises:
        ValueError: unknown dtype, or max_tokens above what a FusedVLM was trained with.
    """
    if request.dtype != "auto" and not isinstance(getattr(torch, request.dtype, None), torch.dtype):
        raise ValueError(f"Unknown dtype {request.dtype!r}; auto, float32, bfloat16 and float16 are known.")
    where = torch.device(request.device) if request.device else device
    config = AutoConfig.from_pretrained(request.model, revision=request.revision)
    if config.model_type == "fusedvlm":
        chat = VisualChat(request.model, request.revision, where, request.dtype)
        m = min(request.max_tokens, config.max_num_visual_tokens)
        if m < request.max_tokens:
            say(f"The variant was trained with up to {m} visual tokens: n = 1 ... {m}.")
        return ImageBranches(chat.model, chat.processor, m), True
    tokenizer = AutoTokenizer.from_pretrained(request.model, revision=request.revision)
    model: Any = AutoModelForCausalLM.from_pretrained(request.model, revision=request.revision, dtype=request.dtype)
    return TextBranches(model.to(where), tokenizer, request.max_tokens), False


def _measure(
    request: Request, encoder: BranchEncoder, images: bool, done: Progress, state: StateFile, processes: PartialState
) -> Progress:
    """Run this process's shard to the end, with a bar on the main process."""
    shard = (processes.process_index, processes.num_processes)
    total = None if request.limit is None else len(range(shard[0], request.limit, shard[1]))
    if total is not None and done.done > total:
        raise ValueError(f"{state.path} already holds {done.done} rows; --limit {request.limit} asks for fewer.")
    if done.done:
        say(f"Continuing after {done.done} rows.")
    with progress(
        description="pairs", total=total, initial=done.done, disable=not processes.is_main_process, leave=False
    ) as bar:
        for count in accumulate(
            encoder, _pairs(request, images, shard, done.done), done, state, request.batch_size, save_every=32
        ):
            bar.update(count)
    return done


def _pairs(request: Request, images: bool, shard: tuple[int, int], skip: int) -> Iterator[tuple[int, object]]:
    folder = local_folder(request.dataset)
    rows = stream_rows(request.dataset, request.split, request.dataset_revision, request.limit, shard, skip)
    for number, row in rows:
        yield number, read_pair(row, number, images, folder)


def _state_path(path: Path | None, processes: PartialState) -> Path | None:
    """One file per process."""
    if path is None or processes.num_processes == 1:
        return path
    return path.with_name(f"{path.stem}.{processes.process_index}of{processes.num_processes}{path.suffix or '.npz'}")

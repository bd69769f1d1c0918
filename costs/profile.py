"""What one image and one question cost: counted by structure, checked against torch's own counter, and timed.

encode   views to view tokens            fuse     fusion decoder and projection, m visual tokens
prefill  the LLM reads the prompt        decode   one further token of the answer
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration

from .counts import Shapes, count_flops, kv_cache_bytes

if sys.platform == "win32":  # which has no `resource`
    import psutil
else:
    import resource

STAGES = ("encode", "fuse", "prefill", "decode")
DECODE_STEPS = 16


@dataclass(frozen=True)
class Workload:
    """One image and one question: its views, and the tokens beside the visual ones."""

    num_views: int = 10
    text_tokens: int = 35
    question_tokens: int = 10


@dataclass(frozen=True)
class Timing:
    """Medians over `repeats`, in seconds; `peak_bytes` is device memory, or the process's on a CPU."""

    encode: float
    fuse: float
    prefill: float
    decode_token: float
    peak_bytes: int
    repeats: int

    @property
    def time_to_first_token(self) -> float:
        """Pixels to the first token."""
        return self.encode + self.fuse + self.prefill

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of the answer after its first token."""
        return 1 / self.decode_token


@dataclass(frozen=True)
class ProfileRow:
    """Costs at one number of visual tokens; `timing` is None where nothing was run."""

    num_visual_tokens: int
    flops: dict[str, float]
    kv_cache_bytes: int
    timing: Timing | None

    def record(self) -> dict:
        """JSON-ready."""
        row = {"num_visual_tokens": self.num_visual_tokens, "flops": self.flops, "kv_cache_bytes": self.kv_cache_bytes}
        row["tflops"] = self.flops["first_token"] / 1e12
        if self.timing is not None:
            timing = self.timing
            row |= {"timing": asdict(timing), "latency_ms": 1e3 * timing.time_to_first_token}
            row["decode_tokens_per_second"] = timing.decode_tokens_per_second
        return row


class StagedModel:
    """The four stages of a `FusedVLMForConditionalGeneration` as functions of tensors of the right shapes."""

    def __init__(self, model: Any, workload: Workload) -> None:
        self.model, self.workload = model, workload
        self.config = model.config
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def _mask(self, queries: int, keys: int) -> torch.Tensor | None:
        """On the meta device a mask of the right shape: transformers would look into position ids to build one."""
        if self.device.type != "meta":
            return None
        return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.device)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def pixels(self) -> torch.Tensor:
        """Views of one image."""
        size = self.config.vision_config.image_size
        return self._random(self.workload.num_views, 3, size, size)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(V, 3, S, S) to (V, T, C)."""
        return self.model.model.get_view_features(pixels)[0]

    def fuse(self, views: torch.Tensor, m: int) -> torch.Tensor:
        """(V, T, F) to (m or m per view, H)."""
        connector, question = self.model.model.connector, self.workload.question_tokens
        if self.config.fuse_question and (length := connector.llm_tokens(question)):
            self._read(length)
        return connector.example(views, m, question)

    def _read(self, length: int) -> None:
        """The LLM reads a question for the connector."""
        ids = torch.zeros(1, length, dtype=torch.long, device=self.device)
        self.model.model.language_model(input_ids=ids, attention_mask=self._mask(length, length), use_cache=False)

    def prefill(self, visual_tokens: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
        """(m, H) to the first token's logits and the cache."""
        base = self.model.model
        text = base.language_model.get_input_embeddings()(
            torch.zeros(self.workload.text_tokens, dtype=torch.long, device=self.device)
        )
        prompt = torch.cat([visual_tokens, text])[None]
        cache = DynamicCache(config=self.config.text_config)
        mask = self._mask(prompt.shape[1], prompt.shape[1])
        states = base.language_model(
            inputs_embeds=prompt, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return self.model.lm_head(states[:, -1:]), cache

    def decode(self, cache: DynamicCache) -> torch.Tensor:
        """One more token; the cache grows."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        mask = self._mask(1, cache.get_seq_length() + 1)
        states = self.model.model.language_model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return self.model.lm_head(states)


@torch.no_grad()
def count_with_torch(config: FusedVLMConfig, m: int, workload: Workload) -> dict[str, float]:
    """FLOPs of each stage as torch's counter sees them, on the meta device: no weights are made."""
    with torch.device("meta"):
        staged = StagedModel(FusedVLMForConditionalGeneration(config).eval().requires_grad_(False), workload)
    pixels = staged.pixels()

    def counted(stage: Callable, *inputs: Any) -> tuple[float, Any]:
        with FlopCounterMode(display=False) as counter:
            output = stage(*inputs)
        return float(counter.get_total_flops()), output

    vision, views = counted(staged.encode, pixels)
    fusion, visual_tokens = counted(staged.fuse, views, m)
    prefill, (_, cache) = counted(staged.prefill, visual_tokens)
    decode, _ = counted(staged.decode, cache)
    return {"vision": vision, "fusion": fusion, "prefill": prefill, "decode_step": decode}


def check_counts(config: FusedVLMConfig, shapes: Shapes, m: int, workload: Workload, tolerance: float = 1e-3) -> None:
    """Compare our counts with torch's, stage by stage.

    Raises:
        ValueError: naming the stage and both counts when they differ by more than `tolerance`.
    """
    question = workload.question_tokens
    ours = count_flops(shapes, m, workload.num_views, workload.text_tokens, question, skip_masked=False).record()
    for stage, theirs in count_with_torch(config, m, workload).items():
        if abs(ours[stage] - theirs) > tolerance * theirs:
            raise ValueError(f"{stage} at m={m}: counted {ours[stage]:.6g} FLOPs, torch counts {theirs:.6g}.")


@torch.no_grad()
def time_stages(model: Any, m: int, workload: Workload, repeats: int = 5) -> Timing:
    """Run each stage on random inputs of the right shapes, after one warm-up round."""
    staged = StagedModel(model.eval(), workload)
    pixels = staged.pixels()
    is_cuda = staged.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()

    def timed(stage: Callable, *inputs: Any) -> tuple[float, Any]:
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        output = stage(*inputs)
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, output

    rounds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(repeats + 1):
        seconds, views = timed(staged.encode, pixels)
        rounds["encode"].append(seconds)
        seconds, visual_tokens = timed(staged.fuse, views, m)
        rounds["fuse"].append(seconds)
        seconds, (_, cache) = timed(staged.prefill, visual_tokens)
        rounds["prefill"].append(seconds)
        seconds, _ = timed(lambda cache=cache: [staged.decode(cache) for _ in range(DECODE_STEPS)])
        rounds["decode"].append(seconds / DECODE_STEPS)
    encode, fuse, prefill, decode = (statistics.median(rounds[stage][1:]) for stage in STAGES)
    peak = torch.cuda.max_memory_allocated() if is_cuda else _peak_process_bytes()
    return Timing(encode, fuse, prefill, decode, peak, repeats)


@torch.no_grad()
def time_every_count(model: Any, counts: list[int], workload: Workload, repeats: int = 5) -> dict[str, float]:
    """Seconds from view tokens to the visual tokens at every m: one `fuse` after the other, and all in one pass.

    Args:
        model: with an LLM.
        counts: every m.
        workload: one image and one question.
        repeats: timed rounds, in which the two take turns, after one warm-up; medians are returned.
    """
    base, parameter = model.eval().model, next(model.parameters())
    connector, config = base.connector, model.config
    size = (workload.num_views, connector.tokens_per_view(config), connector.view_width())
    given: dict[str, Any] = {
        "view_features": torch.randn(size, device=parameter.device, dtype=parameter.dtype),
        "image_num_views": [workload.num_views],
    }
    if config.fuse_question and workload.question_tokens:
        given["question_input_ids"] = torch.zeros(workload.question_tokens, dtype=torch.long, device=parameter.device)
        given["question_lengths"] = [workload.question_tokens]
    ways = {
        "one_by_one": lambda: [base.get_image_features(num_visual_tokens=m, **given) for m in counts],
        "in_one_pass": lambda: base.fuse_every_count(counts, **given),
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if parameter.device.type == "cuda":
                torch.cuda.synchronize()
            rounds[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in rounds.items()}


def _peak_process_bytes() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def profile(
    config: FusedVLMConfig,
    shapes: Shapes,
    counts: list[int],
    workload: Workload,
    model: Any = None,
    repeats: int = 5,
    on_row: Callable[[int], None] = lambda m: None,
) -> list[ProfileRow]:
    """Costs at each m, counted and, where a model is given, timed.

    Args:
        config: `FusedVLMConfig`.
        shapes: from `counts.read_shapes`.
        counts: numbers of visual tokens.
        workload: one image and one question.
        model: a model with weights to time, or None to count only.
        on_row: called with each finished m.

    Raises:
        ValueError: when our counts and torch's differ, or an m is out of the model's range.
    """
    question = workload.question_tokens
    bytes_per_number = 2 if model is None else next(model.parameters()).element_size()
    rows = []
    for m in counts:
        config.check_num_visual_tokens(m)
        check_counts(config, shapes, m, workload)
        flops = count_flops(shapes, m, workload.num_views, workload.text_tokens, question).record()
        copies = workload.num_views if shapes.connector.per_view else 1
        cache = kv_cache_bytes(shapes, m * copies + workload.text_tokens, bytes_per_number)
        timing = None if model is None else time_stages(model, m, workload, repeats)
        rows.append(ProfileRow(m, flops, cache, timing))
        on_row(m)
    return rows


def profile_table(rows: list[ProfileRow]) -> str:
    """The rows as a table: FLOPs and cache, then what was timed."""
    header = f"{'m':>5} {'TFLOP: vision':>14} {'fusion':>8} {'prefill':>8} {'decode':>8} {'KV MB':>8}"
    if rows[0].timing is not None:
        header += f" {'ms: encode':>11} {'fuse':>8} {'prefill':>8} {'TTFT':>8} {'tokens/s':>9} {'peak GB':>8}"
    lines = [header]
    for row in rows:
        f = row.flops
        line = f"{row.num_visual_tokens:>5} " + " ".join(
            f"{f[name] / 1e12:>{width}.4g}"
            for name, width in (("vision", 14), ("fusion", 8), ("prefill", 8), ("decode_step", 8))
        )
        line += f" {row.kv_cache_bytes / 1e6:>8.2f}"
        if (t := row.timing) is not None:
            times = (t.encode, t.fuse, t.prefill, t.time_to_first_token)
            line += f" {1e3 * times[0]:>11.1f} " + " ".join(f"{1e3 * value:>8.1f}" for value in times[1:])
            line += f" {t.decode_tokens_per_second:>9.1f} {t.peak_bytes / 1e9:>8.2f}"
        lines.append(line)
    return "\n".join(lines)

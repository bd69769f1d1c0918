"""Five questions about one image: what does a fusion row per turn cost beside the published packed row?

At the paper's shapes: 10 views of 145 tokens of width 1,024, m = 256 in front of the first question and m' = 8 in front
of four more, 15 tokens each. Weights are random. Decoders of two and of four layers are timed, the cost of a layer is
half their difference, and 20 layers follow from that. The ways take turns within every round, and what is compared is
process time on one thread, so that other work on the machine weighs on all alike. Ratios are the median over rounds of
the ratio within a round.

    OMP_NUM_THREADS=1 python benchmarks/turns.py --output benchmarks/results
"""

import argparse
import datetime
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm import FusedVLMFusionModel

LAYERS = (2, 4)
PAPER_LAYERS = 20
QUESTION = 15
PACKED, OWN = "packed row, as published", "a row per turn"
REPEATED, CACHED = "a row per turn, views repeated", "start_fusion once, continue_fusion per question"
TRAINED_PACKED, TRAINED_OWN = "packed row, forward and backward", "a row per turn, forward and backward"
SAVING_PACKED = "packed row, forward and backward, layers checkpointed"
SAVING_OWN = "a row per turn, forward and backward, layers checkpointed"
PAIRS = {OWN: PACKED, REPEATED: PACKED, CACHED: PACKED, TRAINED_OWN: TRAINED_PACKED, SAVING_OWN: SAVING_PACKED}


def build(layers: int) -> FusedVLMFusionModel:
    """Connector of the paper's width, with a vision tower of one layer that is not used."""
    config = FusedVLMConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        fuser_config={"num_hidden_layers": layers},
        text_config={"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
                     "num_attention_heads": 1},
        num_visual_tokens=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return FusedVLMFusionModel(config)


class Bench:
    """One decoder and the ways to ask it.

    Args:
        layers: of the decoder.
        counts: m and m' of the turns.
        num_views: views of the image.
    """

    def __init__(self, layers: int, counts: list[int], num_views: int):
        self.model, self.counts = build(layers).eval(), counts
        self.views = torch.randn(num_views, self.model.config.tokens_per_view, 1024) * 0.1
        self.questions = torch.randint(0, 49000, (len(counts), QUESTION))

    def fuse(self, own_rows: bool, repeat: bool = False) -> list[torch.Tensor]:
        """All turns in one call; with `repeat` on literal rows of their own."""
        self.model.config.fusion_row_per_turn = own_rows
        turns = len(self.counts)
        fused, _ = self.model.fuse(
            view_features=self.views.repeat(turns, 1, 1) if repeat else self.views,
            image_num_views=[len(self.views)] * (turns if repeat else 1),
            question_input_ids=self.questions.flatten(),
            question_lengths=[QUESTION] * turns,
            num_visual_tokens=self.counts,
            image_num_questions=[1] * turns if repeat else [turns],
        )
        return fused.segment_states

    def continued(self) -> list[torch.Tensor]:
        """One question after the other behind one cache."""
        self.model.config.fusion_row_per_turn = True
        cache = self.model.start_fusion(self.views)
        asked = zip(self.questions, self.counts, strict=True)
        return [self.model.continue_fusion(cache, question, count) for question, count in asked]

    def learn(self, own_rows: bool, checkpointing: bool = False) -> None:
        """Forward and backward."""
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        sum(states.sum() for states in self.fuse(own_rows)).backward()
        self.model.gradient_checkpointing_disable()
        self.model.zero_grad()
        self.model.eval()

    def ways(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        return {
            PACKED: torch.no_grad()(lambda: self.fuse(False)),
            OWN: torch.no_grad()(lambda: self.fuse(True)),
            REPEATED: torch.no_grad()(lambda: self.fuse(True, repeat=True)),
            CACHED: self.continued,
            TRAINED_PACKED: lambda: self.learn(False),
            TRAINED_OWN: lambda: self.learn(True),
            SAVING_PACKED: lambda: self.learn(False, checkpointing=True),
            SAVING_OWN: lambda: self.learn(True, checkpointing=True),
        }

    @torch.no_grad()
    def difference(self) -> float:
        """Largest difference between the ways that should agree."""
        own = self.fuse(True)
        others = [self.fuse(True, repeat=True), self.continued()]
        return max(float((one - two).abs().max()) for other in others for one, two in zip(own, other, strict=True))


def measure(options: argparse.Namespace) -> tuple[dict[str, dict[int, list[float]]], float]:
    """CPU seconds {way: {layers: rounds}}, and the largest difference between equal ways."""
    counts = [256] + [8] * (options.turns - 1)
    benches = {layers: Bench(layers, counts, options.views) for layers in LAYERS}
    worst = max(bench.difference() for bench in benches.values())
    seconds: dict[str, dict[int, list[float]]] = {}
    for number in range(options.rounds + 1):  # the first warms up
        for layers, bench in benches.items():
            for name, way in bench.ways().items():
                start = time.process_time()
                way()
                if number:
                    seconds.setdefault(name, {}).setdefault(layers, []).append(time.process_time() - start)
    return seconds, worst


def whole(seconds: dict[int, list[float]]) -> list[float]:
    """Seconds of 20 layers, round by round."""
    few, many = (seconds[layers] for layers in LAYERS)
    rest = (PAPER_LAYERS - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    return [low + rest * (high - low) for low, high in zip(few, many, strict=True)]


def report(options: argparse.Namespace, seconds: dict[str, dict[int, list[float]]], worst: float, load: float) -> str:
    """The record, as Markdown."""
    totals = {name: whole(rounds) for name, rounds in seconds.items()}
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    few, many = LAYERS
    lines = [
        "# Five turns: a fusion row per turn against the packed row",
        "",
        f"{options.views} views of 145 tokens, width 1,024, {options.turns} questions of {QUESTION} tokens, m = 256 "
        f"and m' = 8; float32, random weights. Median of {options.rounds} interleaved rounds, CPU seconds, one thread.",
        "",
        f"| way | {few} layers | {many} layers | {PAPER_LAYERS} layers (extrapolated) | to packed at {many} layers | "
        f"to packed at {PAPER_LAYERS} |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in seconds.items():
        seconds_few, seconds_many = (statistics.median(rounds[layers]) for layers in LAYERS)
        ratios = ["", ""]
        if name in PAIRS:
            other = PAIRS[name]
            ratios = [
                f"{ratio(rounds[LAYERS[1]], seconds[other][LAYERS[1]]):.3f}",
                f"{ratio(totals[name], totals[other]):.3f}",
            ]
        cells = [f"{seconds_few:.3f}", f"{seconds_many:.3f}", f"{statistics.median(totals[name]):.2f}", *ratios]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Largest difference between states of the three ways with a row per turn: {worst:.1e}.",
        "",
        f"Hardware: {platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread used; load "
        f"average over the last minute {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end, of which this "
        "program is 1.",
        f"{versions}. Date: {datetime.date.today()}.",
        f"Command: `OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python {shlex.join(sys.argv)}`",
    ]
    return "\n".join(lines) + "\n"


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def main() -> None:
    """Measure, compare, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=10, help="views of the image")
    parser.add_argument("--turns", type=int, default=5, help="questions")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="folder for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    seconds, worst = measure(options)
    text = report(options, seconds, worst, load)
    sys.stdout.write(text)
    if options.output is not None:
        (options.output / f"turns_cpu_{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    found = ratio(whole(seconds[OWN]), whole(seconds[PACKED]))
    if worst > 1e-5 or found > 1.05:
        sys.exit(f"Expected at most 5 % more than the packed row and equal states; got {found:.3f} and {worst:.1e}.")


if __name__ == "__main__":
    main()

"""One elastic run against separately trained variants at equal total compute, on the quickstart's data.

All start from the same towers and the same stage 1. The elastic run is the quickstart's stage 2; its model FLOPs (over
cached view tokens) are the budget. "Separate, from stage 2" is the paper's way: half of the budget trains at the
largest m, the rest is divided among variants that go on from there, each at its own m. "Separate, from stage 1" divides
the whole budget. Scores are the quickstart's, by free decoding on held-out images.

    python benchmarks/elastic.py --output benchmarks/results
"""

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import set_seed
from transformers.utils import logging as hf_logging

from fusedvlm.console import progress, say
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.quickstart.family import evaluate
from fusedvlm.quickstart.kinds import Conversations
from fusedvlm.quickstart.phases import make_generation_trainer
from fusedvlm.quickstart.preparation import vision_side
from fusedvlm.quickstart.pretraining import LanguageModelProcess
from fusedvlm.quickstart.settings import CPU, Settings
from fusedvlm.quickstart.stages import BarCallback, build_variant, train_contrastive

RECIPE = CPU.without_question()  # m from a list, in conversations that hold every kind of question
WAYS = ("elastic", "separate, from stage 2", "separate, from stage 1")


class Bench:
    """What all ways share: towers, stage 1, data, questions."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        language = LanguageModelProcess(settings, folder / "llm")
        try:
            device, stages = torch.device("cpu"), {}
            side = vision_side(settings, folder, device, stages)
            self.samples, self.features, (_, self.held_out_features), self.questions, vision_state = side
            language.wait()
        except BaseException:
            language.stop()
            raise
        model, self.processor = build_variant(settings, str(folder / "llm"))
        model.load_state_dict(vision_state, strict=False)
        train_contrastive(settings, model, self.processor, self.samples, self.features, folder / "stage1")

    def start(self) -> FusedVLMForConditionalGeneration:
        """The model after stage 1."""
        return FusedVLMForConditionalGeneration.from_pretrained(self.folder / "stage1")

    def trainer(self, model, counts: tuple[int, ...], steps: int, name: str, callbacks=()):
        """Stage 2 over some numbers of visual tokens."""
        settings = replace(self.settings, num_visual_tokens=counts)
        dataset = Conversations(self.samples, self.features, steps * settings.batch_size, settings.seed)
        set_seed(settings.seed + 3)
        return make_generation_trainer(
            settings, model, self.processor, dataset, self.folder / name, steps, list(callbacks)
        )

    def train(self, model, counts: tuple[int, ...], steps: int, name: str) -> float:
        """Train, and return the model FLOPs of the run."""
        with contextlib.closing(progress(total=steps, description=name)) as bar:
            trainer = self.trainer(model, counts, steps, name, [BarCallback(bar)])
            rates = trainer.throughput.rates
            total = [0.0]

            def counted():
                total[0] += trainer.throughput.flops
                return rates()

            trainer.throughput.rates = counted
            trainer.train()
        return total[0] + trainer.throughput.flops

    def flops_per_step(self, m: int) -> float:
        """Model FLOPs of a step at one m, from two steps of a model that is thrown away."""
        return self.train(self.start(), (m,), 2, f"counting m={m}") / 2

    def scores(self, model, counts: tuple[int, ...]) -> dict[int, float]:
        """Mean over tasks at each m."""
        settings = replace(self.settings, num_visual_tokens=counts)
        results = evaluate(
            model, self.processor, settings, self.questions, self.held_out_features, "benchmarks/elastic.py", False
        )
        return {
            m: float(np.mean([score.score for score in results.scores if score.num_visual_tokens == m])) for m in counts
        }


def compare(bench: Bench) -> tuple[dict[str, dict[int, float]], dict[str, float], dict[str, dict[int, int]]]:
    """Scores, FLOPs spent and steps taken: each by way, then by m."""
    settings = bench.settings
    counts, largest = settings.num_visual_tokens, settings.max_num_visual_tokens
    model = bench.start()
    budget = bench.train(model, counts, settings.generation_steps, "elastic")
    scores, spent = {"elastic": bench.scores(model, counts)}, {"elastic": budget}
    per_step = {m: bench.flops_per_step(m) for m in counts}
    steps = {"elastic": dict.fromkeys(counts, settings.generation_steps)}

    base, base_steps = bench.start(), round(budget / 2 / per_step[largest])
    base_flops = bench.train(base, (largest,), base_steps, f"stage 2 at m={largest}")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for way, share, first in (
        ("separate, from stage 2", (budget - base_flops) / len(counts), base_flops),
        ("separate, from stage 1", budget / len(counts), 0.0),
    ):
        scores[way], spent[way], steps[way] = {}, first, {}
        for m in counts:
            model = bench.start()
            if first:
                model.load_state_dict(state)
            steps[way][m] = max(1, round(share / per_step[m]))
            spent[way] += bench.train(model, (m,), steps[way][m], f"{way}, m={m}")
            scores[way].update(bench.scores(model, (m,)))
    steps["separate, from stage 2"]["before"] = base_steps
    return scores, spent, steps


def report(settings: Settings, all_seeds: list, options) -> str:
    """The record, as Markdown; mean and range over seeds."""
    counts = settings.num_visual_tokens
    lines = [
        "# One elastic run against separate variants at equal compute",
        "",
        f"Quickstart data, {len(all_seeds)} seed(s); mean score over all tasks, held-out images, free decoding"
        + (" (lowest to highest seed)." if len(all_seeds) > 1 else "."),
        "",
        "| way | PFLOP | " + " | ".join(f"m={m}" for m in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    for way in WAYS:
        cells = []
        for m in counts:
            values = [scores[way][m] for scores, _, _ in all_seeds]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        spent = np.mean([flops[way] for _, flops, _ in all_seeds]) / 1e15
        lines.append(f"| {way} | {spent:.3f} | " + " | ".join(cells) + " |")
    steps = all_seeds[0][2]
    lines += ["", "Steps (seed 0):", ""]
    lines.append(
        f"- elastic: {settings.generation_steps}, of which the first {settings.elastic_warmup_fraction:.0%} at m="
        f"{max(counts)}"
    )
    for way in WAYS[1:]:
        own = ", ".join(f"m={m}: {steps[way][m]}" for m in counts)
        before = f" after {steps[way]['before']} at m={max(counts)}" if "before" in steps[way] else ""
        lines.append(f"- {way}: {own}{before}")
    lines += [
        "",
        f"Hardware: {platform.machine()} CPU, {os.cpu_count()} cores, one thread.",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"Date: {datetime.date.today()}.",
        f"Command: `python {shlex.join(sys.argv)}`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train every way, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=RECIPE.generation_steps, help="steps of the elastic run")
    parser.add_argument("--output", type=Path, help="folder for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    found = []
    for seed in range(options.seeds):
        settings = replace(RECIPE, seed=seed, generation_steps=options.steps)
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(Bench(settings, Path(folder))))
        say(f"seed {seed}: {found[-1][0]}")
    text = report(settings, found, options)
    sys.stdout.write(text)
    if options.output is not None:
        (options.output / f"elastic_cpu_{datetime.date.today()}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The paper's size on an accelerator, with random weights: where the time goes, and what of the peak is used.

    make bench-gpu                                        # everything, about 20 minutes on one large GPU
    python benchmarks/gpu.py --tiny --device cpu          # try the program itself, anywhere

Every part is a file of its own below `--work`; parts that are there are not measured again, so an interrupted run goes
on. Not run on a GPU by its authors: the records of this folder are from CPUs.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runner import RESULTS, commit, environment
from shapes import PAPER_COUNTS, config as small_config

from fusedvlm import FusedVLMConfig
from fusedvlm.costs.counts import count_flops, read_shapes
from fusedvlm.costs.profile import StagedModel, Workload
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration

GOALS = {
    "TTFT of m=768 over m=1": 2.0,
    "prefill at m=256, of the peak": 0.6,
    "vision and fusion at batch 8, of the peak": 0.5,
}


class Bench:
    """The model, made when the first part needs it.

    Args:
        device: where it runs.
        is_tiny: small sizes, to try the program.
    """

    def __init__(self, device: torch.device, is_tiny: bool) -> None:
        self.device, self.is_tiny = device, is_tiny
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.config = small_config(width=64, vision_layers=1, fusion_layers=1) if is_tiny else FusedVLMConfig(
            num_visual_tokens=256, trained_num_visual_tokens=[1, 768], fusion_row_per_turn=True,
            first_query_token_id=49408, fuser_config={"vocab_size": 49408 + 767},
        )  # fmt: skip
        self.workload = Workload(10, 35, 10)
        self._model: Any = None

    @property
    def model(self) -> Any:
        """With random weights, on the device."""
        if self._model is None:
            torch.manual_seed(0)
            before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                with self.device:
                    self._model = FusedVLMForConditionalGeneration(self.config).eval().requires_grad_(False)
            finally:
                torch.set_default_dtype(before)
        return self._model

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(self, way: Callable[[], object], rounds: int = 9) -> dict[str, float]:
        """Median and quartiles of wall time, after two rounds that warm up."""
        found = []
        for number in range(rounds + 2):
            self.wait()
            started = time.perf_counter()
            way()
            self.wait()
            if number > 1:
                found.append(time.perf_counter() - started)
        low, middle, high = statistics.quantiles(found, n=4)
        return {"median": middle, "low": low, "high": high}


@torch.no_grad()
def matmul_peak(bench: Bench) -> dict[str, float]:
    """TFLOP/s of one large product: what a share of the peak is of."""
    size = 256 if bench.is_tiny else 8192
    a = torch.randn(size, size, device=bench.device, dtype=bench.dtype)
    return {"tflops": 2 * size**3 / bench.seconds(lambda: a @ a)["median"] / 1e12}


@torch.no_grad()
def stages(bench: Bench) -> dict[str, Any]:
    """Encode, fuse, prefill and decode at every m, and the peak of memory."""
    staged = StagedModel(bench.model, bench.workload)
    pixels = staged.pixels()
    views, shapes, rows = staged.encode(pixels), read_shapes(bench.config), {}
    encode = bench.seconds(lambda: staged.encode(pixels))
    for m in PAPER_COUNTS:
        tokens = staged.fuse(views, m)
        _, cache = staged.prefill(tokens)
        row = {"encode": encode, "fuse": bench.seconds(lambda m=m: staged.fuse(views, m)),
               "prefill": bench.seconds(lambda tokens=tokens: staged.prefill(tokens)),
               "decode": bench.seconds(lambda cache=cache: staged.decode(cache))}  # fmt: skip
        flops = count_flops(shapes, m, 10, 35, 10).record()
        row["ttft"] = sum(row[part]["median"] for part in ("encode", "fuse", "prefill"))
        row["prefill_tflops"] = flops["prefill"] / row["prefill"]["median"] / 1e12
        rows[str(m)] = row
    peak = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else None
    return {"rows": rows, "peak_bytes": peak}


@torch.no_grad()
def batch_of_eight(bench: Bench) -> dict[str, float]:
    """Vision and fusion of eight images at m = 256."""
    model, size = bench.model.model, bench.config.vision_config.image_size
    images = 2 if bench.is_tiny else 8
    pixels = torch.randn(10 * images, 3, size, size, device=bench.device, dtype=bench.dtype)
    asked = {"image_num_views": [10] * images, "question_lengths": [10] * images,
             "question_input_ids": torch.arange(10, device=bench.device).repeat(images)}  # fmt: skip
    taken = bench.seconds(lambda: model.fuse(pixel_values=pixels, num_visual_tokens=256, **asked))
    flops = count_flops(read_shapes(bench.config), 256, 10, 35, 10).record()
    return {**taken, "tflops": images * (flops["vision"] + flops["fusion"]) / taken["median"] / 1e12}


@torch.no_grad()
def sweep(bench: Bench) -> dict[str, Any]:
    """Ten m one by one, and in one pass."""
    model, size = bench.model.model, bench.config.vision_config.image_size
    pixels = torch.randn(10, 3, size, size, device=bench.device, dtype=bench.dtype)
    asked = {"image_num_views": [10], "question_lengths": [10],
             "question_input_ids": torch.arange(10, device=bench.device)}  # fmt: skip
    return {
        "one by one": bench.seconds(
            lambda: [model.fuse(pixel_values=pixels, num_visual_tokens=m, **asked) for m in PAPER_COUNTS], 3
        ),
        "in one pass": bench.seconds(lambda: model.fuse_every_count(PAPER_COUNTS, pixel_values=pixels, **asked), 3),
    }


@torch.no_grad()
def questions(bench: Bench) -> dict[str, Any]:
    """Five questions about one image: everything again, and behind its cache."""
    model, size = bench.model.model, bench.config.vision_config.image_size
    pixels = torch.randn(10, 3, size, size, device=bench.device, dtype=bench.dtype)
    ids = torch.arange(15, device=bench.device)

    def again() -> None:
        for _ in range(5):
            model.fuse(pixel_values=pixels, image_num_views=[10], question_input_ids=ids, question_lengths=[15],
                       num_visual_tokens=8)  # fmt: skip

    def behind() -> None:
        cache = model.start_fusion(model.get_view_features(pixels)[0])
        for _ in range(5):
            model.continue_fusion(cache, ids, 8)

    return {"again": bench.seconds(again, 3), "behind the cache": bench.seconds(behind, 3)}


PARTS: dict[str, Callable[[Bench], dict]] = {
    "matmul_peak": matmul_peak, "stages": stages, "batch_of_eight": batch_of_eight, "sweep": sweep,
    "questions": questions,
}  # fmt: skip


def report(found: dict[str, dict], device: str, where: dict[str, Any]) -> str:
    """The page."""
    rows, peak = found["stages"]["rows"], found["matmul_peak"]["tflops"]
    memory = (found["stages"]["peak_bytes"] or 0) / 1e9
    columns = ["m", "encode ms", "fuse", "prefill", "TTFT", "decode", "prefill, of the peak"]
    lines = [f"# {device}: the paper's size, random weights", "", f"| {' | '.join(columns)} |", "|---" * 7 + "|"]
    for m, row in rows.items():
        cells = [1e3 * row[part]["median"] for part in ("encode", "fuse", "prefill")] + [
            1e3 * row["ttft"],
            1e3 * row["decode"]["median"],
        ]
        share = row["prefill_tflops"] / peak
        lines.append(f"| {m} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {share:.0%} |")
    reached = [
        rows["768"]["ttft"] / rows["1"]["ttft"],
        rows["256"]["prefill_tflops"] / peak,
        found["batch_of_eight"]["tflops"] / peak,
    ]
    lines += ["", "| goal | wanted | found |", "|---|---|---|"]
    lines += [
        f"| {name} | {goal:g} | {value:.2f} |" for (name, goal), value in zip(GOALS.items(), reached, strict=True)
    ]
    lines += [
        "",
        f"Largest product: {peak:.1f} TFLOP/s. Memory at most {memory:.1f} GB.",
    ]
    for part, (slow, fast) in {
        "sweep": ("one by one", "in one pass"),
        "questions": ("again", "behind the cache"),
    }.items():
        gain = found[part][slow]["median"] / found[part][fast]["median"]
        lines.append(f"{part}: {fast} {gain:.1f} times as fast as {slow}.")
    lines += ["", f"Commit {where['commit']}, {where['date']}. Command: `{where['command']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not there yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: tries the program, says nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-gpu"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny --device cpu tries the program")
    load = os.getloadavg()[0]
    bench, found = Bench(torch.device(options.device), options.tiny), {}
    options.work.mkdir(parents=True, exist_ok=True)
    same = {"device": options.device, "tiny": options.tiny, "commit": commit()}
    conditions = options.work / "conditions.json"
    if conditions.exists() and json.loads(conditions.read_text(encoding="utf-8")) != same:
        parser.error(f"{options.work} has parts of another device, size or commit; give another --work, or remove it")
    conditions.write_text(json.dumps(same), encoding="utf-8")
    for name, part in PARTS.items():
        file = options.work / f"{name}.json"
        if not file.exists():
            print(f"{name} ...", file=sys.stderr)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(part(bench)), encoding="utf-8")
            partial.replace(file)
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU, tiny"
    page = report(found, device, environment(load))
    sys.stdout.write(page)
    if not options.tiny:
        (options.output / "gpu.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

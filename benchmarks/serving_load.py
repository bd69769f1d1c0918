"""Requests per second and time to the first token of running servers, by vLLM's published load generator.

Every request brings an image of its own, so nothing of one request helps another; answers have 8 tokens. The servers
are started beforehand (docs/serving.md); NAME=ADDRESS names each.

    python benchmarks/serving_load.py transformers=http://127.0.0.1:8401 embeds=http://127.0.0.1:8403 \\
        --vllm .venv-vllm/bin/vllm --tokenizer build/vllm-case/llm --output benchmarks/results
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

NEW = 8


def measure(vllm: str, address: str, model: str, tokenizer: str, concurrency: int, m: int, prompts: int) -> dict:
    """What `vllm bench serve` finds of one server at one concurrency and m."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            vllm, "bench", "serve", "--backend", "openai-chat", "--base-url", address,
            "--endpoint", "/v1/chat/completions",
            "--model", model, "--tokenizer", tokenizer, "--dataset-name", "random-mm", "--num-prompts", str(prompts),
            "--random-input-len", "12", "--random-output-len", str(NEW), "--random-mm-base-items-per-request", "1",
            "--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}',
            "--random-mm-bucket-config", "{(64, 64, 1): 1.0}", "--max-concurrency", str(concurrency), "--seed", str(m),
            "--extra-body", json.dumps({"chat_template_kwargs": {"processor_kwargs": {"num_visual_tokens": m}}}),
            "--ignore-eos", "--save-result", "--result-dir", folder, "--result-filename", "result.json",
            "--disable-tqdm",
            "--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99", "--temperature", "0",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-3000:])
        return json.loads((Path(folder) / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=ADDRESS")
    parser.add_argument("--vllm", default="vllm", help="vLLM's command, for its load generator")
    parser.add_argument("--tokenizer", required=True, help="of the language model")
    parser.add_argument("--model", default="tiny", help="what the servers call it")
    parser.add_argument("--what", default="", help="what is served, for the record")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--m", type=int, nargs="+", default=[1, 12])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[list] = []
    load = os.getloadavg()[0]
    version = (
        subprocess.run([options.vllm, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    )
    for entry in options.servers:
        name, _, address = entry.partition("=")
        measure(options.vllm, address, options.model, options.tokenizer, 1, options.m[0], 4)  # warm
        for m in options.m:
            for concurrency in options.concurrency:
                found = measure(
                    options.vllm, address, options.model, options.tokenizer, concurrency, m, options.prompts
                )
                row = [name, m, concurrency, found["completed"], found["request_throughput"], found["p50_ttft_ms"],
                       found["p99_ttft_ms"], found["p50_e2el_ms"]]  # fmt: skip
                rows.append(row)
                print(*row, flush=True)
    lines = [
        "# Load on the servers", "", options.what, "",
        f"`vllm bench serve` ({version}), random-mm: one image of 64 x 64 of its own and a random question per "
        f"request, answers of {NEW} tokens, greedy; {options.prompts} requests a row.", "",
        "| engine | m | concurrency | answered | requests / s | p50 TTFT, ms | p99 TTFT, ms | p50 whole, ms |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {n} | {m} | {c} | {d} | {r:.2f} | {a:.0f} | {b:.0f} | {e:.0f} |" for n, m, c, d, r, a, b, e in rows), "",
        f"Hardware: {platform.machine()} CPU, {os.cpu_count()} cores shared with other work; load average {load:.1f} "
        f"at the start and {os.getloadavg()[0]:.1f} at the end. Date: {datetime.date.today()}.",
        f"Command: `{shlex.join(['python', 'benchmarks/serving_load.py', *sys.argv[1:]])}`", "",
    ]  # fmt: skip
    print("\n".join(lines))
    if options.output is not None:
        (options.output / f"serving_load_cpu_{datetime.date.today()}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()

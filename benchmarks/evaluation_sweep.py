"""What does an evaluation at every m cost beside one at the largest m alone, and beside one run per m?

On a family of the quickstart: questions about pictures of its own world, half of one word and half lists, at every m
of the family. The ways take turns within every round; what is compared is process time on one thread, so that other
work on the machine weighs on all alike, and the median over rounds of the ratio within a round. Tower and fusion are
what comes before the language model: pictures to views, tower, fusion module, projection. Whole commands are timed once
per m as their users would start them, imports and loading included.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_sweep.py --family runs/quickstart --output benchmarks/results
"""

import argparse
import base64
import csv
import datetime
import io
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from fusedvlm.evaluation.answers.answer_run import asked_of
from fusedvlm.evaluation.answers.model_sources import find_variants, share_counts
from fusedvlm.evaluation.answers.variant_answers import BATCH_SIZE, VariantAnswers
from fusedvlm.evaluation.task_options import build_tasks
from fusedvlm.quickstart.world import make_sample
from fusedvlm.serving.chat import VisualChat

FIRST_PICTURE = 3_000_000  # of the world, far from those of training


class Timed(VariantAnswers):
    """Answers, and the process time of tower and fusion among it."""

    before = 0.0

    def _features(self, *arguments: Any) -> Any:
        started = time.process_time()
        found = super()._features(*arguments)
        self.before += time.process_time() - started
        return found


def write_questions(folder: Path, count: int) -> list[Path]:
    """Half as many pictures with a one-word question, half with a list: one.tsv and list.tsv."""
    rows: dict[str, list[dict[str, Any]]] = {"one": [], "list": []}
    number = 0
    while min(map(len, rows.values())) < count // 2:
        sample = make_sample(seed=0, index=FIRST_PICTURE + number)
        number += 1
        if not sample.is_scene:
            continue
        buffer = io.BytesIO()
        sample.image.save(buffer, "PNG")
        cell = sorted(sample.content)[number % len(sample.content)]
        dense = sample.dense_question()
        kind = "one" if len(rows["one"]) <= len(rows["list"]) else "list"
        question, answer = (
            (f"colour at {cell}", sample.content[cell][0]) if kind == "one" else (dense.text, dense.answer)
        )
        image = base64.b64encode(buffer.getvalue()).decode()
        rows[kind].append({"index": number, "image": image, "question": question, "answer": answer})
    paths = []
    for kind, found in rows.items():
        paths.append(folder / f"{kind}.tsv")
        with open(paths[-1], "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(found)
    return paths


def run(chat: VisualChat, tasks: list[Any], counts: list[int]) -> tuple[float, float, list[Any]]:
    """Process time of all answers, that of tower and fusion, and the answers."""
    answerer, answers = Timed(chat), []
    started = time.process_time()
    for task in tasks:
        asked = [asked_of(task, record) for record in task.records()]
        for start in range(0, len(asked), BATCH_SIZE):
            answers += answerer.answer(asked[start : start + BATCH_SIZE], counts)
    return time.process_time() - started, answerer.before, answers


def command_seconds(family: Path, paths: list[Path], counts: list[int], folder: Path) -> float:
    """CPU time of the command line at these m, in a process of its own."""
    command = [
        sys.executable, "-m", "fusedvlm.cli", "evaluate", str(family), "--tasks", ",".join(map(str, paths)),
        "--m", ",".join(map(str, counts)), "--output", str(folder / f"m{'-'.join(map(str, counts))}"),
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(arguments: argparse.Namespace) -> list[str]:
    """The record, line by line."""
    torch.set_num_threads(1)
    variants = find_variants(str(arguments.family))
    ((variant, counts),) = share_counts(variants, None)
    chat = VisualChat(variant.source, device="cpu")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        paths = write_questions(Path(name), arguments.questions)
        tasks = build_tasks([str(path) for path in paths], Path(name))
        run(chat, tasks, counts[:1])  # warm up
        rounds = []
        for _ in range(arguments.rounds):
            sweep = run(chat, tasks, counts)
            alone = {m: run(chat, tasks, [m]) for m in counts}
            rounds.append((sweep, alone))
        commands = [command_seconds(arguments.family, paths, [m], Path(name)) for m in counts]
        whole = command_seconds(arguments.family, paths, counts, Path(name))
    return record(arguments, counts, rounds, (whole, commands), load)


def record(
    arguments: argparse.Namespace, counts: list[int], rounds: list, commands: tuple[float, list[float]], load: float
) -> list[str]:
    """Markdown."""
    largest = max(counts)
    middle = statistics.median
    same = total = 0
    for sweep, alone in rounds[:1]:
        for number, answers in enumerate(sweep[2]):
            same += sum(answers[m] == alone[m][2][number][m] for m in counts)
            total += len(counts)
    rows = [
        ("every m in one pass", middle(s[0] for s, _ in rounds), middle(s[1] for s, _ in rounds)),
        (f"m = {largest} alone", middle(a[largest][0] for _, a in rounds), middle(a[largest][1] for _, a in rounds)),
        (
            "one pass for each m, summed",
            middle(sum(part[0] for part in a.values()) for _, a in rounds),
            middle(sum(part[1] for part in a.values()) for _, a in rounds),
        ),
    ]
    fusion = middle(s[1] / a[largest][1] for s, a in rounds)
    passes = middle(s[0] / sum(part[0] for part in a.values()) for s, a in rounds)
    whole, single = commands
    return [
        "# Every m in one pass",
        "",
        f"Family of the quickstart, m = {', '.join(map(str, counts))}; {arguments.questions} questions about as many "
        f"pictures, half of one word and half lists, batches of {BATCH_SIZE}. Medians of {arguments.rounds} "
        "interleaved rounds, CPU seconds, one thread.",
        "",
        "| | all | tower and fusion |",
        "|---|---|---|",
        *(f"| {name} | {seconds:.2f} | {before:.2f} |" for name, seconds, before in rows),
        "",
        f"- Tower and fusion of the sweep, to m = {largest} alone: {fusion:.2f} (wanted: at most 1.6).",
        f"- The sweep to one pass per m, without imports and loading: {passes:.2f}.",
        f"- The whole command to one command per m: {whole:.1f} s to {sum(single):.1f} s, {whole / sum(single):.2f} "
        "(wanted: at most 0.40).",
        f"- Answers of the sweep equal to those of one pass per m: {same} of {total}.",
        "",
        f"Hardware: {platform.machine()} CPU, {os.cpu_count()} cores, 1 thread used; load average over the last minute "
        f"{load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end, of which this program is 1.",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"Date: {datetime.date.today().isoformat()}.",
        f"Command: `OMP_NUM_THREADS=1 python {shlex.join(arguments.shown)}`",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, required=True, help="folder of a quickstart run")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder that gets evaluation_sweep_cpu_DATE.md")
    arguments = parser.parse_args()
    said = ["--questions", arguments.questions, "--rounds", arguments.rounds, "--output", "benchmarks/results"]
    arguments.shown = ["benchmarks/evaluation_sweep.py", "--family", "runs/quickstart", *map(str, said)]
    text = "\n".join(measure(arguments)) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        name = f"evaluation_sweep_cpu_{datetime.date.today().isoformat()}.md"
        (arguments.output / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

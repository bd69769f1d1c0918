"""One evaluation of a variant or a family, from names to `results.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import cached_file

from fusedvlm.console import say
from fusedvlm.data.generate.llm_client import Endpoint
from fusedvlm.files import read_json
from fusedvlm.serving.chat import VisualChat

from .answers.answer_run import asked_of
from .answers.evaluate_tasks import ANSWERS, Asking, Evaluation, evaluate_tasks, say_unread
from .answers.measure import measure
from .answers.model_sources import find_variants, share_counts
from .answers.processes import own_share
from .answers.server_answers import ServerAnswers
from .answers.variant_answers import VariantAnswers
from .results import EvaluationResults, Latency, TaskScore, plain_results
from .tasks.task_kinds import FileTask

RESULTS = "results.json"


def run_evaluation(
    model: str,
    tasks: Sequence[FileTask],
    counts: Sequence[int] | None,
    output: Path | None,
    command: str,
    view_cache: Path | None = None,
    batch_size: int = 32,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    endpoint: Endpoint | None = None,
    concurrency: int = 8,
    measured: int | None = None,
) -> tuple[dict[str, Any], list[TaskScore], Path] | None:
    """Evaluate, and join the scores with those that the results file has already.

    Args:
        model: variant folder, family folder or Hub repository.
        tasks: what is asked.
        counts: numbers of visual tokens; the variants' own by default.
        output: folder of the results; by default that of the model, of the family where a variant lies in one.
        command: that is running, for the record.
        view_cache, batch_size: see `VariantAnswers`.
        revision, device, dtype: see `VisualChat`.
        measured: pictures over which latency and memory are measured at every m; None for none.
        endpoint, concurrency: a server that answers in place of weights, and requests at a time.

    Returns:
        The new results as plain data, their scores, and the file; None for a process that leaves that to another.

    Raises:
        ValueError: for wrong use and damaged data.
        RuntimeError: when answers are missing.
    """
    share, wait, own_device = own_share(device)
    chats: list[tuple[VisualChat, list[int]]] = []
    if endpoint is not None:
        asking = [ask_server(endpoint, tasks, counts, concurrency)]
    else:
        asking = []
        for variant, wanted in share_counts(find_variants(model, revision), counts):
            chat = VisualChat(variant.source, revision=revision, device=own_device, dtype=dtype)
            answerer = VariantAnswers(chat, view_cache, batch_size)
            answerer.check_counts(wanted)
            chats.append((chat, wanted))
            asking.append(Asking(answerer, variant.source, variant.commit, tuple(wanted)))
    folder = output_folder(model, output)
    evaluation = evaluate_tasks(tasks, asking, folder, command, share, wait)
    if evaluation is None:
        return None
    say_unread(evaluation)
    for chat, wanted in chats if measured else ():
        evaluation.results.latencies += measure(chat, tasks[0], wanted, int(measured or 0))
    path = write_results(folder, evaluation) if evaluation.results.scores else folder / RESULTS
    if evaluation.problems:
        others = f" {len(evaluation.problems) - 1} more like it." if len(evaluation.problems) > 1 else ""
        raise ValueError(evaluation.problems[0] + others)
    return plain_results(evaluation.results), evaluation.results.scores, path


def ask_server(endpoint: Endpoint, tasks: Sequence[FileTask], counts: Sequence[int] | None, concurrency: int) -> Asking:
    """A server as the one who answers.

    Raises:
        ValueError: without m, or when the server does not heed it.
    """
    if not counts:
        raise ValueError("--base-url needs --m: the numbers of visual tokens that the server is asked at.")
    server = ServerAnswers(endpoint, concurrency)
    server.require_dial(asked_of(tasks[0], tasks[0].records()[0]), counts)
    # Which weights a server has is its own matter: with other ones under the same name, choose another output.
    return Asking(server, endpoint.model, "", tuple(counts), endpoint.base_url)


def fusion_inputs(model: str) -> str:
    """What the fusion module of a model reads, as the paper names its three kinds.

    A variant that reads no question and was trained at each m by itself is "(ft)" in the paper; configurations do not
    say so, and the elastic kind is meant.
    """
    source = find_variants(model)[0].source
    config = read_json(str(cached_file(source, "config.json")))
    return "vision+question+queries" if config.get("fuse_question", True) else "vision+queries"


def output_folder(model: str, output: Path | None) -> Path:
    """Where results go: beside the model they are of, so that its card finds them."""
    if output is not None:
        return output
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return Path("runs") / "evaluation" / model.replace("/", "--")
    # A family's file is the one that cards of its variants read.
    is_member = (folder / "config.json").is_file() and (folder.parent / RESULTS).is_file()
    return folder.parent if is_member else folder


def write_results(folder: Path, evaluation: Evaluation) -> Path:
    """Join results with what the file has, and write it."""
    path = folder / RESULTS
    with FileLock(folder / ANSWERS / "results.lock"):
        known = EvaluationResults.load(path) if path.is_file() else None
        joined = evaluation.results if known is None else known.joined(evaluation.results)
        joined.save(path)
    if known is not None:
        say(f"{path} has {len(joined.scores)} scores now, {len(known.scores)} before.")
    return path


def score_lines(rows: Sequence[TaskScore]) -> list[str]:
    """A table as text: one row for each score's name, one column for each m."""
    counts = sorted({row.num_visual_tokens for row in rows})
    by_key = {row.key: row for row in rows}
    labels = list(dict.fromkeys(row.label for row in rows))
    table = [["", *(f"m={m}" for m in counts), "scale", "questions"]]
    for label in labels:
        found = [by_key.get((label, m)) for m in counts]
        first = next(row for row in found if row)
        table.append([label, *map(_cell, found), first.scale, str(first.count)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    unread = sum(row.unparsed for row in rows if row.is_primary)
    return [*lines, *([f"{unread} answers say nothing that can be scored, and count as wrong."] if unread else [])]


def _cell(row: TaskScore | None) -> str:
    if row is None:
        return "-"
    digits = 3 if row.maximum == 1 else 2
    error = "" if row.standard_error is None else f" ± {row.standard_error:.{digits}f}"
    return f"{row.score:.{digits}f}{error}"


def latency_lines(results: dict[str, Any]) -> list[str]:
    """What was measured of time and memory, one line for each m."""
    lines = []
    for row in results["latencies"]:
        timing = Latency(**row)
        peak = "" if timing.peak_memory_bytes is None else f", peak {timing.peak_memory_bytes / 1e9:.2f} GB"
        use = "" if timing.utilization is None else f", {timing.utilization:.0%} busy"
        lines.append(
            f"m={timing.num_visual_tokens}: first token {1e3 * timing.time_to_first_token:.1f} ms, answer "
            f"{1e3 * timing.seconds_per_answer:.1f} ms, {timing.tokens_per_second or 0:.1f} tokens/s{peak}{use} "
            f"({timing.count} pictures)"
        )
    return lines

"""What `--tasks` names: benchmarks by name, files and datasets by path, each with the task class that asks it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedvlm.model_source import HUB_ID

from .harnesses.vlmeval_tasks import Bridge, VlmevalTask, vlmeval_python
from .tasks.paper_benchmarks import BENCHMARKS, PAPER, find_benchmark, paper_task
from .tasks.record_files import RecordFile
from .tasks.task_kinds import KINDS, Captions, FileTask, guess_metric

PRESETS = (PAPER, "plain")
ENDINGS = (".tsv", ".jsonl", ".json")
CAPS = {"captions": 64}  # tokens of an answer where nobody says; 32 otherwise
CAP = 32


def split_list(text: str, option: str) -> list[str]:
    """Names between commas. Raises `ValueError` when there is none, or an empty one."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} {text!r}: names go between commas, none of them empty.")
    return names


def parse_counts(text: str | None) -> list[int] | None:
    """Numbers of visual tokens between commas; None for None.

    Raises:
        ValueError: for what is no whole number from 1.
    """
    if text is None:
        return None
    counts = []
    for name in split_list(text, "--m"):
        if not name.isascii() or not name.isdigit() or int(name) < 1:
            raise ValueError(f"--m {text!r}: {name!r} is no whole number of visual tokens from 1.")
        counts.append(int(name))
    if len(set(counts)) < len(counts):
        raise ValueError(f"--m {text}: an m is there twice.")
    return counts


def build_tasks(
    names: Sequence[str],
    data: Path,
    preset: str = PAPER,
    bare_question: bool = False,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> list[FileTask]:
    """A task for each name.

    Args:
        names: a benchmark, PATH[:METRIC], or OWNER/NAME[@SPLIT][:METRIC] on the Hub.
        data: folder of the benchmarks' files.
        preset: of benchmarks: "paper", or "plain" for the question as it stands.
        bare_question: whether the fusion module reads the question without options and instructions.
        limit: first questions only.
        max_new_tokens: cap of an answer in place of the preset's.

    Raises:
        ValueError: naming what is no task, and what there is.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: there are {' and '.join(PRESETS)}.")
    tasks = [_task(name, data, preset, bare_question, limit) for name in names]
    for task in tasks:
        if max_new_tokens is not None and max_new_tokens != task.max_new_tokens:
            task.max_new_tokens, task.preset = max_new_tokens, f"{task.preset}, cap {max_new_tokens}"
    return tasks


def _task(name: str, data: Path, preset: str, bare_question: bool, limit: int | None) -> FileTask:
    path, _, metric = name.rpartition(":") if name.rpartition(":")[2] in KINDS else (name, "", "")
    if name in BENCHMARKS:
        path, metric = str(find_benchmark(name, data)), ""
    stem = Path(path).stem
    if stem in BENCHMARKS and not metric and preset == PAPER:
        return paper_task(Path(path), bare_question, limit)
    source = _source(path, limit)
    return make_task(source, metric, bare_question)


def vlmeval_tasks(names: Sequence[str], data: Path, output: Path, bare_question: bool, cap: int | None) -> list[Any]:
    """Benchmarks as VLMEvalKit asks and scores them.

    Args:
        names: that VLMEvalKit knows.
        data: folder of their files.
        output: of the evaluation.
        bare_question: whether the fusion module reads the question without options and instructions.
        cap: of an answer, in place of the paper's.

    Raises:
        ValueError: where VLMEvalKit is not installed, or a name is a path.
    """
    if wrong := next((name for name in names if "/" in name or name.endswith(ENDINGS)), None):
        raise ValueError(
            f"--harness vlmevalkit takes names of its benchmarks, not {wrong!r:.60}; put files into --data."
        )
    vlmeval_python()
    bridge = Bridge(data)
    return [VlmevalTask(name, output / "vlmevalkit", bridge, bare_question, cap or 0) for name in names]


def make_task(source: RecordFile, metric: str, bare_question: bool = False) -> FileTask:
    """A task of somebody's own file; without a metric the one that its columns ask for."""
    if not metric:
        metric = guess_metric(source.read())
    return KINDS[metric](source, max_new_tokens=CAPS.get(metric, CAP), bare_question=bare_question)


def _source(path: str, limit: int | None) -> RecordFile:
    repo, _, split = path.partition("@")
    if Path(path).is_file() or path.endswith(ENDINGS):
        if not Path(path).is_file():
            raise ValueError(f"--tasks {path}: no such file.")
        return RecordFile(Path(path).stem, path, limit=limit)
    if Path(repo).is_dir() or HUB_ID.fullmatch(repo):
        return RecordFile(Path(repo).name, repo, split, limit)
    raise ValueError(
        f"--tasks {path!r:.60} is no benchmark ({', '.join(BENCHMARKS)}), no .tsv or .jsonl file and no dataset."[:300]
    )


assert Captions.metric in CAPS

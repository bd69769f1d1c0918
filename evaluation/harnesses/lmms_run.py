"""Benchmarks by lmms-eval, one run of its own command for each m; the first one answers at all of them."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedvlm.console import progress
from fusedvlm.costs.environment import describe_environment
from fusedvlm.evaluation.answers.evaluate_tasks import ANSWERS, Evaluation
from fusedvlm.evaluation.answers.model_sources import find_variants, share_counts
from fusedvlm.evaluation.results import EvaluationResults, ScoreSource, TaskScore, plain_results
from fusedvlm.evaluation.run_evaluation import output_folder, write_results
from fusedvlm.evaluation.tasks.task import EXACT_MATCHING

from .tool_python import find_python

LMMS_EVAL = "lmms-eval"
VARIABLE = "FUSEDVLM_LMMS"  # its Python, where that is elsewhere


def run_lmms(
    model: str, names: Sequence[str], counts: Sequence[int] | None, output: Path | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[TaskScore], Path]:
    """Run lmms-eval at every m, and join its scores with the results file.

    Args:
        model: variant folder, family folder or Hub repository.
        names: tasks of lmms-eval; a folder among them is one of task files (`--include_path`).
        counts: numbers of visual tokens; the variants' own by default.
        output: folder of the results.
        options: `limit`, `device`, `batch_size`.

    Returns:
        New results as plain data, their scores, and the file.

    Raises:
        RuntimeError: when a run failed, or a task has no score.
    """
    python = find_python(LMMS_EVAL, "lmms", VARIABLE, "lmms-eval and fusedvlm")
    parts = share_counts(find_variants(model), counts)
    every = sorted(m for _, own in parts for m in own)
    commits = {m: variant.commit for variant, own in parts for m in own}
    folder = output_folder(model, output)
    place = (folder / ANSWERS / "lmms_eval").resolve()
    version = _version(python)
    results = EvaluationResults(describe_environment(f"lmms-eval --tasks {','.join(names)}"))
    for m in progress(every, description="lmms-eval"):
        found = _run(python, model, names, m, every, place, options)
        source = f"lmms-eval-{version}-m{m}"
        results.sources[source] = ScoreSource(
            LMMS_EVAL, version, preset="lmms-eval", judge=EXACT_MATCHING, model=Path(model).name or model,
            model_commit=commits[m], settings={"limit": options.get("limit")} if options.get("limit") else {},
            environment=results.environment,
        )  # fmt: skip
        results.scores += score_rows(found, m, source, options.get("limit"))
    path = write_results(folder, Evaluation(results))
    return plain_results(results), results.scores, path


def _version(python: Path) -> str:
    script = "import importlib.metadata as m; print(m.version('lmms_eval'))"
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{python} has no lmms-eval; run make env-lmms.")
    return done.stdout.strip()


def _run(
    python: Path,
    model: str,
    names: Sequence[str],
    m: int,
    every: Sequence[int],
    place: Path,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What lmms-eval wrote for one m."""
    output = place / f"m{m}"
    for old in output.rglob("*_results.json"):
        old.unlink()  # an earlier run's would be taken for this one's
    pretrained = str(Path(model).resolve()) if Path(model).is_dir() else model
    arguments = f"pretrained={pretrained},num_visual_tokens={m},counts={':'.join(map(str, every))},journal={place}"
    folders = [name for name in names if Path(name).is_dir()]
    command = [
        str(python), "-m", "lmms_eval", "--model", "fusedvlm", "--model_args", arguments, "--output_path", str(output),
        "--tasks", ",".join(name for name in names if name not in folders), "--log_samples",
        "--batch_size", str(options.get("batch_size") or 32), *(["--include_path", folders[0]] if folders else []),
        *(["--limit", str(options["limit"])] if options.get("limit") else []),
        *(["--device", str(options["device"])] if options.get("device") else []),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    written = sorted(output.rglob("*_results.json"))
    if done.returncode or len(written) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise RuntimeError(f"lmms-eval failed at m={m} (exit code {done.returncode}); it said: {lines[-1][:200]}")
    return json.loads(written[0].read_text(encoding="utf-8"))


def score_rows(found: Mapping[str, Any], m: int, source: str, limit: int | None = None) -> list[TaskScore]:
    """Rows of a results file of lmms-eval.

    Raises:
        RuntimeError: for a task without a number.
    """
    rows = []
    for task, metrics in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        values = {
            name: value
            for name, value in metrics.items()
            if "," in name and "_stderr" not in name and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if not values:
            raise RuntimeError(f"lmms-eval gave no number for {task} at m={m}; it gave {str(dict(metrics))[:150]}.")
        for number, (name, value) in enumerate(values.items()):
            metric, _, kind = name.partition(",")
            error = metrics.get(f"{metric}_stderr,{kind}")
            is_known = isinstance(error, (int, float)) and not isinstance(error, bool)
            rows.append(
                TaskScore(
                    task, m, float(value), int(counts.get("effective", counts.get("original", 0))),
                    float(error) if is_known else None, metric=metric if kind == "none" else f"{metric} {kind}",
                    harness=LMMS_EVAL, note=f"first {limit}" if limit else "", is_primary=number == 0,
                    error_note="as lmms-eval states it" if is_known else "lmms-eval states none", source=source,
                )
            )  # fmt: skip
    return rows

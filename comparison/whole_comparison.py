"""From what was asked for to the summary and its page; what `fusedvlm compare` runs."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import CONNECTORS
from fusedvlm.reducers import REDUCERS

from .cells import Cell, read_plan
from .comparison_page import given_notes, world_notes, write_page
from .entrants import Entrant, all_entrants, parse_entrant, supported_counts, training_jobs
from .plan import PRESETS, Plan
from .run_comparison import Comparison, refused_counts
from .summary import Summary, check_same_tasks, read_given, summarize_cells, verdicts


@dataclass(frozen=True)
class Request:
    """The command line, typed."""

    names: Sequence[str]
    everything: bool
    output: Path
    tokens: str | None
    seeds: int
    preset: str
    tflops: float | None
    reference: str | None
    threads: int


def split_paths(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Names, and folders or files.

    Raises:
        ValueError: for something that looks like a path and is not there.
    """
    paths = [Path(argument) for argument in arguments if "/" in argument or argument.endswith(".json")]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; give a folder with results.json, or such a file.")
    shown = {str(path) for path in paths}
    return [argument for argument in arguments if argument not in shown and Path(argument) not in paths], paths


def make_plan(preset: str, tokens: str | None, tflops: float | None) -> Plan:
    """The preset with what was changed. Raises `ValueError` for unknown presets and counts that are none."""
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; presets are {', '.join(PRESETS)}.")
    plan = PRESETS[preset]
    if tokens is not None:
        try:
            counts = tuple(sorted({int(part) for part in tokens.split(",")}))
        except ValueError:
            raise ValueError(
                f"--tokens {tokens!r}: numbers of visual tokens stand between commas, as in 1,4,16."
            ) from None
        if counts[0] < 1:
            raise ValueError(f"--tokens {tokens!r}: a comparison needs at least 1 visual token.")
        plan = replace(plan, num_visual_tokens=counts)
    if tflops is not None:
        if tflops <= 0:
            raise ValueError(f"--tflops {tflops:g}: a training needs more than none.")
        plan = replace(plan, training_tflops=tflops)
    return plan


def choose_entrants(names: Sequence[str], everything: bool, plan: Plan) -> list[Entrant]:
    """Who takes part, each once, in the order asked for; all known ones that can give any m of the plan for `--all`."""
    chosen = [parse_entrant(name) for name in names]
    if everything:
        chosen += [entrant for entrant in all_entrants() if _can_take_part(entrant, plan)]
    if not chosen:
        raise ValueError("Name what to compare, or use --all; `fusedvlm compare --list` shows what there is.")
    return list(dict.fromkeys(chosen))


def _can_take_part(entrant: Entrant, plan: Plan) -> bool:
    try:
        supported_counts(entrant, plan)
    except ValueError:
        return False
    return True


def compare_names(request: Request) -> tuple[Summary, Path, str]:
    """Train and measure what is missing; returns the summary, its page and its title."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(request.threads)
    plan = make_plan(request.preset, request.tokens, request.tflops)
    entrants = choose_entrants(request.names, request.everything, plan)
    keys = [entrant.key for entrant in entrants]
    reference = _reference(request, keys)
    refused = refused_lines(entrants, plan)
    comparison = Comparison(plan, request.output, shlex.join(["fusedvlm", *sys.argv[1:]]))
    return _write(request, comparison, comparison.run(entrants, request.seeds), keys, reference, refused)


def report_finished(request: Request) -> tuple[Summary, Path, str]:
    """The page of the cells that are there, while others are still at work or were never done; nothing is trained.

    Raises:
        ValueError: when the folder has no finished cell of those asked for.
    """
    plan = read_plan(request.output)
    comparison = Comparison(plan, request.output, shlex.join(["fusedvlm", *sys.argv[1:]]))
    asked = choose_entrants(request.names, request.everything, plan) if request.names or request.everything else []
    cells = comparison.cells(asked or None)
    if not cells:
        raise ValueError(f"{request.output} has no finished cell of what was asked for; run without --report first.")
    found = {(cell.entrant, cell.num_visual_tokens, cell.seed) for cell in cells}
    entrants = asked or [parse_entrant(key) for key in dict.fromkeys(cell.entrant for cell in cells)]
    ranks = [entrant.key for entrant in all_entrants()]
    keys = sorted((entrant.key for entrant in entrants), key=lambda key: ranks.index(key) if key in ranks else 99)
    seeds = 1 + max(cell.seed for cell in cells)
    missing = [
        f"{entrant.key} at m = {', '.join(map(str, absent))}, seed {seed}: not finished, so not on this page."
        for entrant, _, counts, seed in comparison.jobs(entrants, seeds)
        if (absent := [m for m in counts if (entrant.key, m, seed) not in found])
    ]
    refused = [*missing, *refused_lines(entrants, plan)]
    there = [key for key in keys if any(cell.entrant == key for cell in cells)]
    return _write(request, comparison, cells, there, _reference(request, there), refused)


def _reference(request: Request, keys: Sequence[str]) -> str | None:
    reference = request.reference or ("fused" if "fused" in keys else None)
    if reference is not None and reference not in keys:
        raise ValueError(f"--reference {reference!r} is not compared; take one of {', '.join(keys)}.")
    return reference


def _write(
    request: Request,
    comparison: Comparison,
    cells: Sequence[Cell],
    keys: list[str],
    reference: str | None,
    refused: Any,
) -> tuple[Summary, Path, str]:
    """Summary and page of finished cells."""
    plan = comparison.plan
    cells = sorted(cells, key=lambda cell: (keys.index(cell.entrant), cell.num_visual_tokens, cell.seed))
    points = summarize_cells(cells, reference)
    environments = list({json.dumps(cell.environment, sort_keys=True): cell.environment for cell in cells}.values())
    notes = [*world_notes(plan, cells, comparison.command), *refused]
    summary = Summary(points, reference, verdicts(points, reference), notes, environments)
    title = "Connectors and reducers at equal training compute"
    if plan.num_images == PRESETS["glance"].num_images:
        title += " (glance: the scores mean nothing)"
    lead = (
        f"{len(keys)} ways to m visual tokens on one rendered world; at most {plan.questions_per_task} held-out "
        "questions in each of five tasks, answered by free greedy decoding. One-word questions ask for a color, a "
        "shape or a letter; dense ones for the whole image."
    )
    return summary, write_page(summary, request.output, title, lead, refused), title


def refused_lines(entrants: Sequence[Entrant], plan: Plan) -> list[str]:
    """Every entrant and the m it cannot give, with its own reason, one line per entrant."""
    lines: dict[str, list[tuple[int, str]]] = {}
    for entrant, m, reason in refused_counts(entrants, plan):
        lines.setdefault(entrant.key, []).append((m, reason))
    return [f"{key} at m = {', '.join(str(m) for m, _ in reasons)}: {reasons[0][1]}" for key, reasons in lines.items()]


def compare_given(paths: Sequence[Path], output: Path) -> tuple[Summary, Path, str]:
    """Compare results as they are."""
    points = [point for path in paths for point in read_given(path)]
    names = [point.entrant for point in points]
    if len(set(names)) < len(paths):
        raise ValueError(f"Two of {', '.join(map(str, paths))} have the same name; name folders apart.")
    check_same_tasks(points)
    summary = Summary(points, None, verdicts(points, None), given_notes())
    title, lead = "Given results side by side", f"{len(set(names))} sets of results, as their files have them."
    return summary, write_page(summary, output, title, lead, name="given"), title


def catalog(preset: str, tokens: str | None) -> tuple[dict, str]:
    """What can be compared, as a document and as text."""
    plan = make_plan(preset, tokens, None)
    connectors: list[dict[str, Any]] = []
    reducers: list[dict[str, Any]] = []
    for entrant in all_entrants():
        if entrant.reducer is not None:
            continue
        kind = CONNECTORS[entrant.connector]
        try:
            counts, refused = supported_counts(entrant, plan)
        except ValueError as error:
            counts, refused = [], {0: str(error)}
        summary = getattr(kind, "summary", None) or (kind.__doc__ or "").strip().split("\n")[0]
        connectors.append(
            {
                "name": entrant.key,
                "summary": summary,
                "num_visual_tokens": counts,
                "reads_question": entrant.reads_question,
                "nested": kind.nested,
                "one_training": bool(counts) and len(training_jobs(entrant, plan, counts)) == 1,
                "settings": sorted(kind.settings),
                "cannot": {str(m): reason for m, reason in refused.items()},
            }
        )
    for name, reducer in REDUCERS.items():
        usable = "" if not reducer.reads_question else "needs a CLIP with a text half, so not in this world"
        reducers.append(
            {"name": f"dense+{name}", "summary": reducer.summary, "source": reducer.source, "not_here": usable or None}
        )
    lines = [f"Connectors (m of {', '.join(map(str, plan.num_visual_tokens))} in this world):"]
    width = max(len(row["name"]) for row in [*connectors, *reducers]) + 2
    for row in connectors:
        facts = f"m = {', '.join(map(str, row['num_visual_tokens'])) or 'none'}"
        facts += f"; {'reads the question' if row['reads_question'] else 'no question'}"
        facts += "; one set of weights for all m" if row["one_training"] else "; one set of weights per m"
        lines += [f"  {row['name']:<{width}}{row['summary']}", f"  {'':<{width}}{facts}"]
        if row["settings"]:
            lines.append(f"  {'':<{width}}settings: {', '.join(row['settings'])}")
    lines += ["", "Training-free reducers over the dense connector's weights:"]
    for row in reducers:
        note = f" ({row['not_here']})" if row["not_here"] else ""
        lines.append(f"  {row['name']:<{width}}{row['summary']}; {row['source']}{note}")
    lines += ["", f"Presets: {', '.join(PRESETS)}. Settings of a connector follow its name: fused:fuse_question=false"]
    return {"connectors": connectors, "reducers": reducers, "presets": list(PRESETS)}, "\n".join(lines)

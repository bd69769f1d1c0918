"""One measured cell per file, written whole: what a killed run leaves is either finished or absent."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fusedvlm.files import write_atomically

from .plan import Plan

ONE_WORD, DENSE = ("colour", "shape", "letter"), ("list", "read")


@dataclass(frozen=True)
class Cell:
    """An entrant at one m and seed.

    Args:
        scores: per task, one score per held-out question, in the same order for every entrant.
        flops: of one question up to the first token: tower, connector, llm.
        latency_ms: first token of one question: median, and the quartiles around it.
        training: `TrainingRecord` of its weights.
        environment: where it was measured.
    """

    entrant: str
    num_visual_tokens: int
    seed: int
    scores: dict[str, list[float]]
    flops: dict[str, float]
    latency_ms: dict[str, float]
    training: dict[str, float]
    environment: dict

    @property
    def total_flops(self) -> float:
        """Tower, connector and LLM."""
        return sum(self.flops.values())

    def save(self, path: Path) -> None:
        """Write the cell, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), allow_nan=False))

    @classmethod
    def load(cls, path: Path) -> "Cell":
        """Read a cell. Raises `ValueError` naming a file that is none."""
        try:
            cell = cls(**json.loads(path.read_text(encoding="utf-8")))
            complete = cell.scores and all(cell.scores.values()) and {"tower", "connector", "llm"} == set(cell.flops)
            complete = complete and "median" in cell.latency_ms and "tflops" in cell.training
        except (TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a finished cell ({error}); delete it and run again.") from None
        if not complete:
            raise ValueError(f"{path} lacks scores, FLOPs, latency or training; delete it and run again.")
        return cell


def claim_folder(folder: Path, plan: Plan) -> None:
    """Tie a run folder to its plan, or find it tied to the same one: cells of two plans are never mixed.

    Raises:
        ValueError: naming what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, ours = folder / "plan.json", json.loads(json.dumps(asdict(plan)))
    if not path.exists():
        write_atomically(path, json.dumps(ours, indent=2))
        return
    try:
        theirs: Mapping = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise ValueError(f"{path} is damaged; use another --output, or delete the folder.") from None
    changed = [name for name, value in ours.items() if theirs.get(name) != value]
    if changed:
        first = "; ".join(f"{name} {theirs.get(name)}, now {ours[name]}" for name in changed[:3])
        raise ValueError(
            f"{folder} holds a comparison with other settings ({first}). Use another --output, or the same settings."
        )


def read_plan(folder: Path) -> Plan:
    """The plan a run folder is tied to. Raises `ValueError` for a folder that has none."""
    try:
        fields = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        return Plan(**{**fields, "num_visual_tokens": tuple(fields["num_visual_tokens"])})
    except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is no run folder of a comparison ({type(error).__name__}: plan.json).") from None

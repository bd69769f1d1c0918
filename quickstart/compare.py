"""What the question buys: the same towers trained without it, by the same recipe and by the unconditioned one.

Both spend as many model FLOPs on stage 2 as the family with the question did, so that neither is short of compute.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fusedvlm.console import say
from fusedvlm.evaluation import EvaluationResults
from fusedvlm.files import write_json

from . import world
from .family import MEASURED, Family, evaluate
from .phases import Material, train_to_equal_compute
from .preparation import Prepared, start_stage_2
from .settings import Settings

TITLES = {
    "question": "reads the question",
    "twin": "without the question, the same recipe",
    "unconditioned": "without the question, its own recipe",
}


@dataclass
class Entrant:
    """One recipe: what it scored and what it spent on stage 2."""

    name: str
    results: EvaluationResults
    stages: dict[str, Any]

    @property
    def title(self) -> str:
        """For legends and tables."""
        return TITLES[self.name]

    @property
    def steps(self) -> int:
        """Optimizer steps of stage 2, both phases."""
        return self.stages["steps"] + self.stages.get("look_up", {}).get("steps", 0)

    def means(self, dense: bool) -> dict[int, float]:
        """{m: mean score} over one-word tasks, or over dense ones."""
        kept = [score for score in self.results.scores if (score.task in world.DENSE_TASKS) == dense]
        counts = sorted({score.num_visual_tokens for score in kept})
        return {m: float(np.mean([s.score for s in kept if s.num_visual_tokens == m])) for m in counts}

    def errors(self, dense: bool) -> dict[int, float]:
        """{m: standard error} of those means: of the questions, not of seeds."""
        kept = [score for score in self.results.scores if (score.task in world.DENSE_TASKS) == dense]
        counts = sorted({score.num_visual_tokens for score in kept})
        by_m = {m: [s.standard_error or 0.0 for s in kept if s.num_visual_tokens == m] for m in counts}
        return {m: float(np.sqrt(np.sum(np.square(errors))) / len(errors)) for m, errors in by_m.items()}


@dataclass
class Comparison:
    """The family with the question beside those without it."""

    entrants: list[Entrant] = field(default_factory=list)

    def table(self) -> list[str]:
        """Mean scores as lines of text."""
        lines = []
        for dense, what in ((False, "one-word tasks"), (True, "list and read")):
            lines.append(f"Mean over {what}, all with the same compute in stage 2:")
            for entrant in self.entrants:
                cells = "  ".join(f"m={m}: {score:.3f}" for m, score in entrant.means(dense).items())
                lines.append(f"  {entrant.title:<38} {cells}")
        return lines

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            entrant.name: {
                "title": entrant.title,
                "one_word": entrant.means(dense=False),
                "dense": entrant.means(dense=True),
                "stages": entrant.stages,
                "scores": [asdict(score) for score in entrant.results.scores],
            }
            for entrant in self.entrants
        }


def rival_settings(settings: Settings, spent: dict[str, Any]) -> dict[str, Settings]:
    """The recipes without the question.

    Args:
        settings: of the family with the question.
        spent: what its stage 2 recorded.
    """
    looked_up = spent.get("look_up", {}).get("steps", settings.look_up_steps)
    twin = replace(settings, fuse_question=False, look_up_steps=looked_up, look_up_loss=None)
    return {"twin": twin, "unconditioned": settings.without_question()}


def compare_recipes(settings: Settings, prepared: Prepared, family: Family, command: str) -> Comparison:
    """Train what goes without the question, measure it on the same questions, and write it down.

    Args:
        settings: of the family with the question.
        prepared: its towers, images and questions.
        family: finished; its record gains the comparison.
        command: what the user typed.
    """
    spent = family.stages["generation"]
    comparison = Comparison([Entrant("question", family.results, spent)])
    for name, rival in rival_settings(settings, spent).items():
        say(f"Comparison: {TITLES[name]}, {spent['tflops']:.3g} TFLOPs of stage 2.")
        folder = family.folder / MEASURED / name
        model, processor, contrastive = start_stage_2(rival, prepared, folder / "stage1")
        material = Material(prepared.samples, prepared.features, folder / "stage2")
        stages = train_to_equal_compute(rival, model, processor, material, spent["tflops"])
        questions, features = prepared.questions, prepared.held_out_features
        results = evaluate(model, processor, rival, questions, features, command, swapped=False)
        results.save(folder / "results.json")
        comparison.entrants.append(Entrant(name, results, {"contrastive": contrastive, **stages}))
    write_json(family.folder / MEASURED / "comparison.json", comparison.record())
    return comparison

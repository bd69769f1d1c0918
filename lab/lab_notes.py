"""What stands beneath the numbers of a lab: what was equal, what the clock cut, what they do not say."""

from collections.abc import Sequence

from .lab_jobs import LabFolder
from .lab_plan import LabPlan
from .variant_grid import Grid


def lab_lead(plan: LabPlan) -> str:
    """The first paragraph of the page."""
    return (
        f"{len(plan.llm_widths)} language models of two layers, {', '.join(map(str, plan.llm_widths))} wide; over each "
        "fusion that reads the question and fusion that does not, each trained once for every m and scored at "
        f"m = {', '.join(map(str, plan.num_visual_tokens))} on held-out images of the quickstart's world."
    )


def lab_notes(lab: LabFolder, grid: Grid, text_tokens: int, question_tokens: int, command: str) -> list[str]:
    """Of a lab that was trained here."""
    plan = lab.plan
    notes = [f"{job.name}: not finished, so not or not wholly on this page." for job in lab.unfinished()]
    for variant in grid.variants:
        stages = (variant.training or {}).get("stages", {})
        if stages.get("steps", 0) < stages.get("planned_steps", 0):
            notes.append(
                f"{variant.name}: the clock cut stage 2 after {stages['steps']} of {stages['planned_steps']} steps."
            )
    return [
        *notes,
        f"Seed {plan.seed} for all: world, language models, order of training. One seed: standard errors are those of "
        f"{plan.questions_per_task} held-out questions per task, not what another training would give.",
        f"Equal for all: {plan.num_images} training images, the frozen tower and its tokens, {plan.llm_steps} steps "
        "of text for every language model, steps of stage 2 within a family. Stage 1 is left out.",
        "With the question: one-word questions at m = 1 until their loss has fallen, then every kind of conversation, "
        "any m. Without it: the unconditioned recipe of the quickstart, m from the measured ones.",
        "Language models read only texts of this world. A smaller one is a worse one, as what each answers from texts "
        "says; sizes here differ by factors, those of a product by orders of magnitude.",
        *_ways(grid, text_tokens, question_tokens, command),
    ]


def given_notes(grid: Grid, text_tokens: int, question_tokens: int, command: str) -> list[str]:
    """Of results that were there."""
    return [
        "Scores and standard errors are those of the files; nothing was trained here, and data, recipes and towers are "
        "whatever each variant had.",
        *_ways(grid, text_tokens, question_tokens, command),
    ]


def _ways(grid: Grid, text_tokens: int, question_tokens: int, command: str) -> Sequence[str]:
    environments = [variant.results.environment for variant in grid.variants]
    first = environments[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    kinds = "; ".join(f"{kind}: {', '.join(tasks)}" for kind, tasks in grid.kinds.items())
    return [
        f"Kinds of question, each the mean of its tasks: {kinds}.",
        "The law is fitted by least squares of the error, weighed by standard errors, with 0 <= D <= 0.3; intervals "
        "are profiles by an F test, so that scatter beyond the standard errors counts.",
        f"FLOPs: {text_tokens} text tokens in a prompt besides the visual ones, {question_tokens} of them read by "
        "fusion, an image that fills its views, attention as its lower triangle; a multiply-add is two.",
        f"Measured on {first.hardware}, {first.date}, {versions}.",
        f"Command: {command}",
    ]

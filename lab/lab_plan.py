"""What `fusedvlm scaling lab` trains: language models of several sizes, each with the question and without."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fusedvlm.files import read_json, write_json
from fusedvlm.quickstart.settings import CPU, Settings

FAMILIES = {True: "question", False: "no-question"}


@dataclass(frozen=True)
class LabPlan:
    """Everything that distinguishes one lab from another; the defaults fit two idle CPU cores and a quarter of an hour.

    Sizes are those of the quickstart where nothing else is said; every language model has two layers, reads the same
    number of texts, and stays frozen afterwards.

    Args:
        llm_widths: of the language models. The smallest cannot answer every question from a text in so many steps.
        generation_steps: of stage 2 behind the look-up phase, with the question; the unconditioned recipe, without it,
            takes 1.28 times as many.
        divergence_pairs: pairs of held-out images.
    """

    llm_widths: tuple[int, ...] = (24, 32, 64)
    num_visual_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seed: int = 0
    num_images: int = 12_000
    num_held_out: int = 800
    questions_per_task: int = 256
    llm_steps: int = 700
    warmup_steps: int = 180
    look_up_steps: int = 700
    generation_steps: int = 850
    batch_size: int = 64
    groups: tuple[tuple[str, int], ...] = CPU.groups
    divergence_pairs: int = 96

    def settings(self, llm_width: int, reads_question: bool) -> Settings:
        """Those of one training."""
        settings = replace(
            CPU,
            seed=self.seed,
            num_images=self.num_images,
            num_held_out=self.num_held_out,
            llm_steps=self.llm_steps,
            llm_width=llm_width,
            warmup_steps=self.warmup_steps,
            num_visual_tokens=self.num_visual_tokens,
            between=(),
            questions_per_task=self.questions_per_task,
            look_up_steps=self.look_up_steps,
            generation_steps=self.generation_steps,
            batch_size=self.batch_size,
            groups=self.groups,
            followups=(1, 2, 4),
        )
        return settings if reads_question else settings.without_question()


@dataclass(frozen=True)
class Training:
    """One set of weights: a language model, with the question or without."""

    llm_width: int
    reads_question: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"llm{self.llm_width}-{FAMILIES[self.reads_question]}"


DEFAULT = LabPlan()
# Seconds, for a look at the page; its scores mean nothing.
GLANCE = replace(
    DEFAULT, llm_widths=(8, 16), num_visual_tokens=(1, 2, 4), num_images=48, num_held_out=40, questions_per_task=4,
    llm_steps=4, warmup_steps=3, look_up_steps=3, generation_steps=4, batch_size=6, divergence_pairs=3,
    groups=(("one_word", 3), ("follow_up", 2), ("dense", 3), ("dense_first", 2)),
)  # fmt: skip
PRESETS = {"cpu": DEFAULT, "glance": GLANCE}


def make_plan(preset: str, llm_widths: str | None, tokens: str | None, seed: int) -> LabPlan:
    """The preset with what was changed.

    Raises:
        ValueError: for an unknown preset, fewer than two language models or m, and sizes that cannot be.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; presets are {', '.join(PRESETS)}.")
    plan = replace(PRESETS[preset], seed=seed)
    if llm_widths is not None:
        plan = replace(plan, llm_widths=_numbers(llm_widths, "--llm-widths", "16,32,64"))
        if wrong := [width for width in plan.llm_widths if width % 8]:
            raise ValueError(f"--llm-widths: {wrong[0]} is not a multiple of 8 (four heads of an even width).")
    if tokens is not None:
        plan = replace(plan, num_visual_tokens=_numbers(tokens, "--tokens", "1,4,16"))
    for numbers, option in ((plan.llm_widths, "--llm-widths"), (plan.num_visual_tokens, "--tokens")):
        if len(numbers) < 2:
            raise ValueError(f"{option}: a law over them needs at least two, got {len(numbers)}.")
    return plan


def _numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"{option} {text!r}: whole numbers stand between commas, as in {example}.") from None
    if numbers[0] < 1:
        raise ValueError(f"{option} {text!r}: numbers start at 1.")
    return numbers


def claim_folder(folder: Path, plan: LabPlan) -> None:
    """Tie a run folder to its plan, or find it tied to the same one: cells of two plans are never mixed.

    Raises:
        ValueError: naming what differs.
    """
    path, ours = folder / "plan.json", json.loads(json.dumps(asdict(plan)))
    if not path.exists():
        write_json(path, ours)
        return
    theirs: Mapping = read_json(path)
    changed = [name for name, value in ours.items() if theirs.get(name) != value]
    if changed:
        first = "; ".join(f"{name} {theirs.get(name)}, now {ours[name]}" for name in changed[:3])
        raise ValueError(
            f"{folder} holds a lab with other settings ({first}). Use another --output, or the same settings."
        )


def read_plan(folder: Path) -> LabPlan:
    """The plan a run folder is tied to. Raises `ValueError` for a folder that has none."""
    fields = read_json(folder / "plan.json")
    try:
        lists = {name: tuple(fields[name]) for name in ("llm_widths", "num_visual_tokens")}
        groups = tuple((kind, count) for kind, count in fields["groups"])
        return LabPlan(**{**fields, **lists, "groups": groups})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'plan.json'} is no plan of a lab ({error}); use another --output.") from None

"""A family of variants from scratch in minutes: every stage with the package's own classes, at toy sizes.

language model (text only, frozen afterwards)  |  in parallel: render images, vision warm-up, cache view tokens
stage 1: ContrastiveTrainer                     fusion states of questions against their answers
stage 2: GenerationTrainer                      answers through the frozen language model: look-up first, then every m
evaluation at every m, on held-out images       free decoding, also of second turns and with images swapped
one folder per m, loaded back through AutoModelForImageTextToText
"""

from pathlib import Path
from typing import Any

from fusedvlm.scaling import fit_power_law

from .compare import compare_recipes
from .family import (
    Family,
    evaluate,
    evaluate_second_turns,
    load_and_ask,
    save_family,
    save_question_scores,
    save_record,
)
from .phases import Material, train_generation
from .preparation import prepare, start_stage_2
from .settings import Settings
from .stages import Clock


def run(settings: Settings, output: Path, command: str, with_comparison: bool = False) -> Family:
    """Train, evaluate, save and reload one family of variants.

    Args:
        settings: sizes and budget.
        output: folder of the family; earlier variants in it are replaced only by finished ones.
        command: what the user typed, for the record.
        with_comparison: afterwards train the same towers without the question, with equal compute.

    Raises:
        RuntimeError: when the language model could not be trained.
    """
    clock = Clock(settings.minutes)
    stages: dict[str, Any] = {}
    prepared = prepare(settings, output, stages)
    stages["seconds_until_towers"] = round(clock.elapsed(), 1)
    model, processor, stages["contrastive"] = start_stage_2(settings, prepared, output / "stage1")
    material = Material(prepared.samples, prepared.features, output / "stage2")
    stages["generation"] = train_generation(settings, model, processor, material, clock)
    stages["seconds_until_trained"] = round(clock.elapsed(), 1)
    asked, features = prepared.questions, prepared.held_out_features
    results = evaluate(model, processor, settings, asked, features, command, swapped=False)
    save_question_scores(output, asked, results)
    swapped = evaluate(model, processor, settings, asked, features, command, swapped=True)
    family = Family(output, results, swapped, None, stages=stages)
    if settings.between:
        family.between = evaluate(
            model, processor, settings, asked, features, command, swapped=False, counts=settings.between
        )
    family.second_turns = evaluate_second_turns(model, processor, settings, asked, prepared.held_out, features)
    folders = save_family(settings, model.cpu(), processor, output)
    family.examples, results.latencies = load_and_ask(folders, prepared.held_out, settings.seed)
    stages["seconds_total"] = round(clock.elapsed(), 1)
    means = family.mean_scores()
    if min(means.values()) > 0:  # a power law has no zeros
        family.fit = fit_power_law(list(means), list(means.values()))
    save_record(family, settings)
    if with_comparison:
        family.comparison = compare_recipes(settings, prepared, family, command)
    return family

"""A family of variants from scratch in minutes: every stage with the package's own classes, at toy sizes.

language model (text only, frozen afterwards)  |  in parallel: render images, vision warm-up, cache view tokens
stage 1: ContrastiveTrainer                     fusion states of questions against their answers
stage 2: GenerationTrainer, elastic m           answers through the frozen language model
evaluation at every m, on held-out images       free decoding, also with images swapped between questions
one folder per m, loaded back through AutoModelForImageTextToText
"""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as hf_logging

from fusedvlm.console import progress
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import VISION_PREFIXES
from fusedvlm.scaling import fit_power_law

from . import world
from .family import Family, evaluate, held_out_questions, load_and_ask, save_family, save_record
from .language import build_model, build_tokenizer
from .pretraining import LanguageModelProcess
from .settings import Settings
from .stages import Clock, build_variant, train_contrastive, train_generation
from .vision import cell_labels, encode_views, process_images, warm_up_vision


def prepare_images(settings: Settings, processor_images, device_samples: int):
    """Render and process the training images; (samples, pixels in half precision, labels)."""
    samples, pixels = [], []
    for start in progress(range(0, device_samples, 256), description="rendering images"):
        part = [world.make_sample(settings.seed, i) for i in range(start, min(start + 256, device_samples))]
        pixels.append(process_images(processor_images, part).half())
        samples += part
    labels = torch.from_numpy(np.stack([cell_labels(sample) for sample in samples]))
    return samples, torch.cat(pixels), labels


def run(settings: Settings, output: Path, command: str) -> Family:
    """Train, evaluate, save and reload one family of variants.

    Args:
        settings: sizes and budget.
        output: folder of the family; earlier variants in it are replaced only by finished ones.
        command: what the user typed, for the record.

    Raises:
        RuntimeError: when the language model could not be trained.
    """
    clock = Clock(settings.minutes)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages: dict = {}
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    language = LanguageModelProcess(settings, output / "llm")
    try:
        # The vision side needs no language model yet, so it is built over an untrained one meanwhile.
        samples, features, held_out, questions, vision_state = _vision_side(settings, output, device, stages)
        stages["language_model_loss"] = language.wait()
    except BaseException:
        language.stop()
        raise
    stages["seconds_until_towers"] = round(clock.elapsed(), 1)
    model, processor = build_variant(settings, str(output / "llm"))
    model.load_state_dict(vision_state, strict=False)
    stages["contrastive"] = train_contrastive(settings, model, processor, samples, features, output / "stage1")
    model = FusedVLMForConditionalGeneration.from_pretrained(output / "stage1")
    stages["generation"] = train_generation(settings, model, processor, samples, features, output / "stage2", clock)
    stages["seconds_until_trained"] = round(clock.elapsed(), 1)
    held_out_samples, held_out_features = held_out
    results = evaluate(model, processor, settings, questions, held_out_features, command, swapped=False)
    swapped = evaluate(model, processor, settings, questions, held_out_features, command, swapped=True)
    folders = save_family(settings, model.cpu(), processor, output)
    examples, results.latencies = load_and_ask(folders, held_out_samples, settings.seed)
    stages["seconds_total"] = round(clock.elapsed(), 1)
    family = Family(output, results, swapped, None, examples, stages)
    means = family.mean_scores()
    if min(means.values()) > 0:  # a power law has no zeros
        family.fit = fit_power_law(list(means), list(means.values()))
    save_record(family, settings)
    return family


def _vision_side(settings: Settings, output: Path, device, stages: dict):
    """Render, warm up, cache: training samples and features, held-out ones, questions, trained vision weights."""

    stand_in = output / "llm-untrained"
    tokenizer = build_tokenizer()
    build_model(tokenizer, settings.llm_width, settings.llm_layers).save_pretrained(stand_in)
    tokenizer.save_pretrained(stand_in)
    model, processor = build_variant(settings, str(stand_in))
    shutil.rmtree(stand_in)
    model.to(device)
    samples, pixels, labels = prepare_images(settings, processor, settings.num_images)
    with contextlib.closing(progress(total=settings.warmup_steps, description="vision warm-up")) as bar:

        def on_step(accuracy: float) -> None:
            bar.update(1)
            bar.set_postfix(cells_right=f"{accuracy:.3f}")

        stages["vision_warmup_cells_right"] = warm_up_vision(
            model, pixels, labels, settings.warmup_steps, settings.batch_size, settings.seed, device, on_step
        )
    model.eval()
    with contextlib.closing(progress(total=len(pixels), description="caching view tokens")) as bar:
        features = encode_views(model, pixels, device, on_batch=bar.update)
    held_out, questions = held_out_questions(settings)
    held_out_features = encode_views(model, process_images(processor, held_out), device)
    vision_state = {n: t.cpu() for n, t in model.state_dict().items() if n.startswith(VISION_PREFIXES)}
    return samples, features, (held_out, held_out_features), questions, vision_state

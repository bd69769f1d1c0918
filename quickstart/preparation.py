"""What every recipe starts from: language model, vision tower, cached view tokens, questions, stage 1."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as hf_logging

from fusedvlm.console import progress
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import VISION_PREFIXES

from . import world
from .family import Questions, held_out_questions
from .language import build_model, build_tokenizer
from .pretraining import LanguageModelProcess
from .settings import Settings
from .stages import build_variant, train_contrastive
from .vision import cell_labels, encode_views, process_images, warm_up_vision


def prepare_images(
    settings: Settings, processor_images: Any, device_samples: int
) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Render and process the training images; (samples, pixels in half precision, labels)."""
    samples, pixels = [], []
    for start in progress(range(0, device_samples, 256), description="rendering images"):
        part = [world.make_sample(settings.seed, i) for i in range(start, min(start + 256, device_samples))]
        pixels.append(process_images(processor_images, part).half())
        samples += part
    labels = torch.from_numpy(np.stack([cell_labels(sample) for sample in samples]))
    return samples, torch.cat(pixels), labels


@dataclass
class Prepared:
    """What every recipe trains on and is measured by: towers, images, questions."""

    samples: list[world.Sample]
    features: torch.Tensor
    held_out: list[world.Sample]
    held_out_features: torch.Tensor
    questions: Questions
    vision_state: dict[str, torch.Tensor]
    llm: Path


def prepare(settings: Settings, output: Path, stages: dict[str, Any]) -> Prepared:
    """Language model and, in parallel, the vision side.

    Raises:
        RuntimeError: when the language model could not be trained.
    """
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    language = LanguageModelProcess(settings, output / "llm")
    try:
        # The vision side needs no language model yet, so it is built over an untrained one meanwhile.
        samples, features, (held_out, held_out_features), questions, state = vision_side(
            settings, output, device, stages
        )
        stages["language_model_loss"] = language.wait()
    except BaseException:
        language.stop()
        raise
    return Prepared(samples, features, held_out, held_out_features, questions, state, output / "llm")


def start_stage_2(settings: Settings, prepared: Prepared, folder: Path) -> tuple[Any, Any, dict[str, float]]:
    """A model after stage 1, its processor, and what stage 1 reached."""
    model, processor = build_variant(settings, str(prepared.llm))
    model.load_state_dict(prepared.vision_state, strict=False)
    reached = train_contrastive(settings, model, processor, prepared.samples, prepared.features, folder)
    return FusedVLMForConditionalGeneration.from_pretrained(folder), processor, reached


def vision_side(settings: Settings, output: Path, device: torch.device, stages: dict[str, Any]) -> tuple:
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

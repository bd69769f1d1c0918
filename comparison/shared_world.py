"""What every entrant shares: a frozen language model, a frozen tower, images as cached view tokens, held-out questions.

Built once in the run folder, each part whole or not there; `fusedvlm.quickstart` has the images and the language model.
"""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase, set_seed

from fusedvlm.console import progress
from fusedvlm.files import write_atomically
from fusedvlm.processing import FusedVLMImageProcessor
from fusedvlm.quickstart import world
from fusedvlm.quickstart.language import build_tokenizer
from fusedvlm.quickstart.pretraining import LanguageModelProcess
from fusedvlm.quickstart.settings import Settings
from fusedvlm.quickstart.vision import CellReader, cell_labels

from .plan import Plan

PATCH = world.CELL
HELD_OUT = 3_000_000  # index of the first held-out image; training images count from 0
WORDS = (*world.COLOURS, *world.SHAPES, *world.LETTERS)


@dataclass
class SharedWorld:
    """Samples carry no image; `pixels` (images, 3, S, S) of all of them, 8 bits each, are beside them."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    samples: list[world.Sample]
    pixels: torch.Tensor
    held_out: list[world.Sample]
    held_out_pixels: torch.Tensor
    questions: dict[str, list[tuple[int, world.Question]]]
    tower_cells_right: float

    @property
    def llm_folder(self) -> Path:
        """The frozen language model."""
        return self.folder / "llm"

    @torch.no_grad()
    def view_tokens(self, model: Any, part: str) -> torch.Tensor:
        """(images, T, F) what the model's connector reads of every "training" or "held_out" image, in half precision.

        Cached in the run folder, by what the connector says its view tokens depend on.
        """
        key = json.dumps([part, model.model.connector.view_settings()], sort_keys=True)
        path = self.folder / f"views-{part}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
        if not path.exists():
            pixels = self.pixels if part == "training" else self.held_out_pixels
            batches = progress(pixels.split(256), f"caching view tokens ({part})", leave=False)
            tokens = torch.cat(
                [model.model.get_view_features(normalize(batch).to(model.device))[0].half().cpu() for batch in batches]
            )
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"tokens": tokens.contiguous()}, partial)
            partial.rename(path)
        return load_file(path)["tokens"]

    def tower(self) -> CLIPVisionModel:
        """A fresh copy of the frozen tower."""
        return CLIPVisionModel.from_pretrained(self.folder / "tower").eval()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """(images, 3, S, S) 8-bit pixels of whole views to what the image processor makes of them."""
    processor = image_processor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (pixels.float() / 255 - mean) / std


def image_processor() -> FusedVLMImageProcessor:
    """One view of the whole image, its cells on the tower's patches."""
    return FusedVLMImageProcessor(size={"height": world.SIZE, "width": world.SIZE}, max_local_views=0)


def open_world(plan: Plan, folder: Path, device: torch.device) -> SharedWorld:
    """Read the shared world of a run, building what is missing.

    Args:
        plan: sizes; a folder built to others is refused by the caller, see `cells.claim_folder`.
        folder: `RUN/world`.
        device: for the tower's training.

    Raises:
        RuntimeError: when the language model could not be trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    language = None
    if not (folder / "llm" / "model.safetensors").exists():
        settings = Settings(llm_steps=plan.llm_steps, llm_width=plan.llm_width, llm_layers=plan.llm_layers)
        language = LanguageModelProcess(settings, folder / "llm")
    try:
        if not (folder / "tower.json").exists():
            _build_vision(plan, folder, device)
        if language is not None:
            language.wait()
    except BaseException:
        if language is not None:
            language.stop()
        raise
    record = json.loads((folder / "tower.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "images.safetensors")
    held_out = _samples(record["held_out"])
    return SharedWorld(
        folder=folder,
        tokenizer=build_tokenizer(),
        samples=_samples(record["training"]),
        pixels=tensors["training"],
        held_out=held_out,
        held_out_pixels=tensors["held_out"],
        questions=draw_held_out_questions(held_out, plan.questions_per_task),
        tower_cells_right=record["cells_right"],
    )


def draw_held_out_questions(samples: list, per_task: int) -> dict[str, list[tuple[int, world.Question]]]:
    """Per task, (image number, question); every entrant, m and seed answers the same ones."""
    generator = np.random.default_rng([HELD_OUT, 3])
    questions: dict[str, list] = {task: [] for task in world.TASKS}
    for number, sample in enumerate(samples):
        dense = sample.dense_question()
        questions[dense.task].append((number, dense))
        for task in sample.cell_tasks():
            cell = list(sample.content)[generator.integers(len(sample.content))]
            questions[task].append((number, sample.cell_question(task, cell)))
    return {task: asked[:per_task] for task, asked in questions.items()}


def _build_vision(plan: Plan, folder: Path, device: torch.device) -> None:
    """Render, teach the tower, cache; `tower.json` is written last and says that the rest is there."""
    samples, pixels = _render(0, plan.num_images, "rendering images")
    held_out, held_out_pixels = _render(HELD_OUT, plan.num_held_out, "rendering held-out images")
    set_seed(1)
    tower: Any = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=plan.vision_width,
            intermediate_size=plan.vision_width * 2,
            num_hidden_layers=plan.vision_layers,
            num_attention_heads=4,
            image_size=world.SIZE,
            patch_size=PATCH,
        )
    )
    tower.to(device)
    cells_right = teach_tower(tower, pixels, samples, plan, device)
    partial = folder / "tower.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tower.cpu().save_pretrained(partial)
    shutil.rmtree(folder / "tower", ignore_errors=True)
    partial.rename(folder / "tower")
    save_file({"training": pixels, "held_out": held_out_pixels}, folder / "images.partial")
    (folder / "images.partial").rename(folder / "images.safetensors")
    record = {"cells_right": cells_right, "training": _contents(samples), "held_out": _contents(held_out)}
    write_atomically(folder / "tower.json", json.dumps(record))


def _render(first: int, count: int, description: str) -> tuple[list, torch.Tensor]:
    samples = [world.make_sample(0, first + index) for index in progress(range(count), description, leave=False)]
    pixels = np.stack([np.asarray(sample.image) for sample in samples])
    return samples, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def teach_tower(
    tower: CLIPVisionModel, pixels: torch.Tensor, samples: list, plan: Plan, device: torch.device | str
) -> float:
    """The stand-in for CLIP's training: patches tell their cells, the class token tells which words the image holds.

    Patches are read at both layers that connectors read: the last, normalized, and the one before. The class token's
    task is there for reducers that ask what it attends to; untrained, it attends to nothing.

    Args:
        pixels: (images, 3, S, S), 8 bits.

    Returns:
        Share of cells read right over the last 10 steps, at both layers.
    """
    cells = torch.from_numpy(np.stack([cell_labels(sample) for sample in samples]))
    words = torch.tensor([[word in _words(sample) for word in WORDS] for sample in samples]).float()
    last, before = (CellReader(plan.vision_width).to(device) for _ in range(2))
    presence = nn.Linear(plan.vision_width, len(WORDS)).to(device)
    parameters = [p for part in (tower, last, before, presence) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    normalize_last = getattr(tower, "vision_model", tower).post_layernorm
    generator, right = torch.Generator().manual_seed(0), []
    with contextlib.closing(progress(total=plan.tower_steps, description="teaching the tower", leave=False)) as bar:
        for step in range(plan.tower_steps):
            rate = min(1.0, (step + 1) / 20, (plan.tower_steps - step) / (0.3 * plan.tower_steps))
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * rate
            pick = torch.randint(len(pixels), (64,), generator=generator)
            states = tower(normalize(pixels[pick]).to(device), output_hidden_states=True).hidden_states
            top, labels = normalize_last(states[-1]), cells[pick].to(device)
            (loss, accuracy), (loss_before, accuracy_before) = (
                last(top[:, 1:], labels),
                before(states[-2][:, 1:], labels),
            )
            seen = nn.functional.binary_cross_entropy_with_logits(presence(top[:, 0]), words[pick].to(device))
            optimizer.zero_grad()
            (loss + loss_before + seen).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            right.append(min(accuracy.item(), accuracy_before.item()))
            bar.update(1)
            bar.set_postfix(cells_right=f"{right[-1]:.3f}")
    return float(np.mean(right[-10:]))


def _words(sample: world.Sample) -> set[str]:
    return {word for what in sample.content.values() for word in ([what] if isinstance(what, str) else what)}


def _contents(samples: list[world.Sample]) -> list:
    return [[sample.is_scene, sample.content] for sample in samples]


def _samples(contents: list) -> list[world.Sample]:
    return [
        world.Sample(
            None, is_scene, {cell: what if isinstance(what, str) else tuple(what) for cell, what in content.items()}
        )
        for is_scene, content in contents
    ]

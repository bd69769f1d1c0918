"""Rendered images to view tokens: the vision warm-up and the cache of its output.

The warm-up teaches the vision tower what each cell shows, from the renderer's own labels. It stands in for a pretrained
CLIP, which this package otherwise starts from; it is not CLIP training.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from . import world

if TYPE_CHECKING:
    from fusedvlm.processing import FusedVLMProcessor

COLOURS, SHAPES = list(world.COLOURS), list(world.SHAPES)


def cell_labels(sample: world.Sample) -> np.ndarray:
    """(16, 3) classes of each cell: colour, shape, letter; 0 means none."""
    labels = np.zeros((len(world.CELLS), 3), dtype=np.int64)
    for cell, what in sample.content.items():
        row = world.CELLS.index(cell)
        if sample.is_scene:
            labels[row, :2] = COLOURS.index(what[0]) + 1, SHAPES.index(what[1]) + 1
        else:
            labels[row, 2] = world.LETTERS.index(what) + 1
    return labels


def token_of_cell() -> list[tuple[int, int]]:
    """(view, token) that shows each cell: local views are quadrants, their 2 x 2 merged tokens single cells."""
    places = []
    for row in range(world.GRID):
        for column in range(world.GRID):
            view = 1 + 2 * (row // 2) + column // 2
            places.append((view, 2 * (row % 2) + column % 2))
    return places


class CellReader(nn.Module):
    """Linear heads that read colour, shape and letter off a view token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            [nn.Linear(width, classes + 1) for classes in (len(COLOURS), len(SHAPES), len(world.LETTERS))]
        )

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 16, C) tokens and (B, 16, 3) labels to the summed loss and the share of cells read right."""
        logits = [head(tokens) for head in self.heads]
        losses = [
            nn.functional.cross_entropy(part.flatten(0, 1), labels[..., k].flatten()) for k, part in enumerate(logits)
        ]
        right = torch.stack([part.argmax(-1) == labels[..., k] for k, part in enumerate(logits)]).all(0)
        total: Any = sum(losses)
        return total, right.float().mean()


def process_images(processor: "FusedVLMProcessor", samples: Sequence[world.Sample]) -> torch.Tensor:
    """(images, views, 3, S, S) through the package's image processor."""
    batch = processor.image_processor([sample.image for sample in samples], return_tensors="pt")
    views = int(batch["image_num_views"][0])
    return batch["pixel_values"].unflatten(0, (-1, views))


def warm_up_vision(
    model: Any,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    on_step: Callable[[float], None] = lambda accuracy: None,
) -> float:
    """Teach vision tower and merge to tell what each cell shows.

    Args:
        model: `FusedVLMForConditionalGeneration`; its vision tower and merge are trained in place.
        pixels: (images, views, 3, S, S).
        labels: (images, 16, 3) from `cell_labels`.
        on_step: called with the step's share of cells read right.

    Returns:
        Share of cells read right over the last 10 steps.
    """
    base = model.model
    reader = CellReader(base.config.vision_config.hidden_size).to(device)
    parameters = [*base.vision_tower.parameters(), *base.merger.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([*parameters, *reader.parameters()], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    views, tokens = (torch.tensor(part) for part in zip(*token_of_cell(), strict=True))
    accuracies = []
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        pick = torch.randint(len(pixels), (batch_size,), generator=generator)
        features, _ = base.get_view_features(pixels[pick].float().flatten(0, 1).to(device))
        features = features.unflatten(0, (batch_size, -1))[:, views, tokens]
        loss, accuracy = reader(features, labels[pick].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        accuracies.append(accuracy.item())
        on_step(accuracies[-1])
    return float(np.mean(accuracies[-10:]))


@torch.no_grad()
def encode_views(
    model: Any,
    pixels: torch.Tensor,
    device: torch.device | str,
    batch_size: int = 128,
    on_batch: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """(images, views, tokens per view, C) view tokens of the frozen vision tower, in half precision."""
    parts = []
    for part in pixels.split(batch_size):
        features, _ = model.model.get_view_features(part.float().flatten(0, 1).to(device))
        parts.append(features.unflatten(0, (len(part), -1)).half().cpu())
        on_batch(len(part))
    return torch.cat(parts)

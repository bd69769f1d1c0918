"""QueCC: query-based convolutional cross-attention, the prompt-based compression of "Inference Optimal VLMs Need Fewer
Visual Tokens and More Parameters" (fusedvlm's docs/reference.md, "QueCC")."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .modeling_fusedvlm_connector import FusedVLMConnector, register_connector
from .modeling_fusedvlm_connector_parts import (
    FusedVLMConnectorAttention,
    FusedVLMConnectorMLP,
    check_heads,
    grid_side,
    grid_to_tokens,
    last_question_states,
    tokens_to_grid,
)


class FusedVLMQueCCProjection(nn.Module):
    """Linear, exact GELU, linear, norm: how queries, keys and values are made."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(in_width, width)
        self.down_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(V, N, in_width) to (V, N, width)."""
        return self.norm(self.down_proj(nn.functional.gelu(self.up_proj(tokens))))


@register_connector("quecc")
class FusedVLMQueCCConnector(FusedVLMConnector):
    """A strided depth-wise convolution makes h x h queries of patches and question; each attends to its own block.

    The question is the LLM's last-layer state at its last token, added to every patch before the queries are made; keys
    and values are four layers of the tower side by side. m = h x h is fixed when the model is built, and h divides the
    side of the grid (other kernels crash in the published code, and are refused here).
    """

    summary = "Queries made of patches and question each read their own part of the image (QueCC)."
    reads_question = "always"
    question_tokens = "llm"
    settings = {"kernel_size": None, "stride": None, "layers": None, "num_heads": 8, "mlp_layers": 2}

    @classmethod
    def counts(cls, config: PreTrainedConfig) -> Sequence[int]:
        """h x h alone."""
        return (cls._queries_per_side(config, config.connector_config) ** 2,)

    @classmethod
    def _queries_per_side(cls, config: PreTrainedConfig, settings: dict[str, Any]) -> int:
        return (grid_side(config) - settings["kernel_size"]) // settings["stride"] + 1

    @classmethod
    def explain_counts(cls, config: PreTrainedConfig) -> str:
        """The kernel decides."""
        side, settings = grid_side(config), config.connector_config
        return f"has kernel {settings['kernel_size']}, stride {settings['stride']} on a {side} x {side} grid"

    @classmethod
    def complete_settings(cls, config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
        """Without a kernel m decides on it; without layers, 12, 16, 22 and 23 of 24 as published, or as deep."""
        side, depth = grid_side(config), config.vision_config.num_hidden_layers
        kernel = settings["kernel_size"] or cls._kernel_of(config, side)
        settings = {**settings, "kernel_size": kernel, "stride": settings["stride"] or kernel}
        if settings["layers"] is None:
            settings["layers"] = [depth // 2, 2 * depth // 3, max(depth - 2, 0), depth - 1]
        if min(settings["layers"], default=-1) < 0 or max(settings["layers"]) > depth:
            raise ValueError(f"connector_config layers={settings['layers']} must be hidden states 0 to {depth}.")
        if settings["mlp_layers"] < 1:
            raise ValueError(f"connector_config mlp_layers={settings['mlp_layers']} must be at least 1.")
        check_heads(cls.name, config.vision_config.hidden_size, settings["num_heads"])
        queries = cls._queries_per_side(config, settings) if 1 <= kernel <= side and settings["stride"] >= 1 else 0
        if queries < 1 or side % queries:
            raise ValueError(
                f"connector_config kernel_size={kernel}, stride={settings['stride']}: {queries} x {queries} queries do "
                f"not divide a {side} x {side} grid; take a kernel and stride of {cls._divisors(side)}."
            )
        return settings

    @classmethod
    def _kernel_of(cls, config: PreTrainedConfig, side: int) -> int:
        wanted = max(config.trained_num_visual_tokens or [0]) or config.num_visual_tokens
        if wanted is None:
            return 4 if side % 4 == 0 else max(k for k in range(1, side + 1) if side % k == 0 and k * k <= side)
        root = math.isqrt(max(wanted, 0))
        if root < 1 or root * root != wanted or side % root:
            counts = ", ".join(str((side // k) ** 2) for k in range(side, 0, -1) if side % k == 0)
            raise ValueError(
                f"num_visual_tokens={wanted} cannot be given: the quecc connector's kernel must divide a "
                f"{side} x {side} grid; take one of {counts}."
            )
        return side // root

    @classmethod
    def _divisors(cls, side: int) -> str:
        return ", ".join(str(k) for k in range(1, side + 1) if side % k == 0)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, out_width = config.vision_config.hidden_size, config.text_config.hidden_size
        settings = config.connector_config
        many = len(settings["layers"]) * width
        self.question_proj = nn.Linear(out_width, width)
        self.question_norm = nn.LayerNorm(width, eps=1e-6)
        self.query = FusedVLMQueCCProjection(width, width)
        self.key = FusedVLMQueCCProjection(many, width)
        self.value = FusedVLMQueCCProjection(many, width)
        self.downsample = nn.Conv2d(
            width, width, kernel_size=settings["kernel_size"], stride=settings["stride"], groups=width
        )
        self.attention = FusedVLMConnectorAttention(width, settings["num_heads"])
        self.mlp = FusedVLMConnectorMLP(width, out_width, settings["mlp_layers"])

    def hidden_layers(self) -> tuple[int, ...]:
        """The layers of keys and values, and the one before the last for the queries."""
        return tuple(sorted({*self.config.connector_config["layers"], *super().hidden_layers()}))

    def read_questions(
        self, questions: list[torch.Tensor], language_model: nn.Module | None
    ) -> tuple[torch.Tensor, ...]:
        """(G, H) states of the LLM at the last token of each question."""
        return (last_question_states(questions, language_model, self.name),)

    def example_question(self, num_views: int, question_length: int) -> tuple[torch.Tensor, ...]:
        """States of the right shape."""
        weight = self.question_proj.weight
        return (weight.new_zeros(num_views, weight.shape[1]),)

    def llm_tokens(self, question_length: int) -> int:
        """The LLM reads the whole question."""
        return question_length

    def reduce(self, view_tokens: torch.Tensor, num_visual_tokens: int, *question: torch.Tensor) -> torch.Tensor:
        """(V, N, layers x C) and question states (V, H) to (V, m, H)."""
        layers = dict(zip(self.hidden_layers(), view_tokens.chunk(len(self.hidden_layers()), dim=-1), strict=True))
        last = layers[super().hidden_layers()[0]]
        many = torch.cat([layers[layer] for layer in self.config.connector_config["layers"]], dim=-1)
        return self.mlp(self.compress(last, many, question[0]))

    def compress(self, patches: torch.Tensor, many: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Patches (V, N, C), the same of several layers (V, N, layers x C), states (V, H) to (V, m, C), row by row."""
        told = self.question_norm(self.question_proj(question.to(patches.dtype)))
        grid = self.downsample(tokens_to_grid(self.query(patches + told[:, None])))
        views, _, height, _ = grid.shape
        queries = grid_to_tokens(grid).flatten(0, 1)[:, None]
        keys, values = (grid_blocks(part(many), height) for part in (self.key, self.value))
        return self.attention(queries, keys, values).reshape(views, height * height, -1)


def grid_blocks(tokens: torch.Tensor, blocks: int) -> torch.Tensor:
    """(V, side x side, C) to (V x blocks x blocks, patches of a block, C), blocks row by row."""
    grid = tokens_to_grid(tokens)
    size = grid.shape[-1] // blocks
    parts = grid.unflatten(2, (blocks, size)).unflatten(4, (blocks, size))  # V, C, block row, row, block column, column
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)

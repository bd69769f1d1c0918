"""Pool: averages over squares of the patch grid; one image at several resolutions, one set of weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .modeling_fusedvlm_connector import FusedVLMConnector, register_connector
from .modeling_fusedvlm_connector_parts import FusedVLMConnectorMLP, grid_side, grid_to_tokens, tokens_to_grid

PROJECT_FIRST, POOL_FIRST = "project_first", "pool_first"


@register_connector("pool")
class FusedVLMPoolConnector(FusedVLMConnector):
    """m = t x t averages of the patch grid, in either published order.

    `order="project_first"` (Matryoshka Multimodal Models): LLaVA's MLP, then averages in the LLM's space; t divides the
    side of the grid, and a coarser token is the average of finer ones. The published code rounds other counts up to the
    next it knows, drops the right and lower rest where t does not divide the side, and reduces nothing above a quarter
    of the patches; here they are refused.

    `order="pool_first"` (TokenFLEX): averages of the tower's features, resized bilinearly where t does not divide the
    side, then a gated MLP per token; any t up to the side. Not nested: the MLP of an average is no average. The
    published code floors counts that are no squares, and accepts more tokens than patches; here they are refused.
    """

    summary = "Patches are averaged over squares of their grid (Matryoshka Multimodal Models, TokenFLEX)."
    settings = {"order": PROJECT_FIRST, "mlp_layers": 2}

    @classmethod
    def counts(cls, config: PreTrainedConfig) -> Sequence[int]:
        """Squares: of divisors of the side, or of everything up to it."""
        side = grid_side(config)
        divides = [t for t in range(1, side + 1) if side % t == 0]
        return tuple(t * t for t in (range(1, side + 1) if cls._order(config) == POOL_FIRST else divides))

    @classmethod
    def _order(cls, config: PreTrainedConfig) -> str:
        return (config.connector_config or {}).get("order", PROJECT_FIRST)

    @classmethod
    def is_nested(cls, config: PreTrainedConfig) -> bool:
        """In the first order only."""
        return cls._order(config) == PROJECT_FIRST

    @classmethod
    def explain_counts(cls, config: PreTrainedConfig) -> str:
        """Which squares."""
        side = grid_side(config)
        what = "averages whole squares" if cls._order(config) == PROJECT_FIRST else "averages to squares"
        return f"{what} of a {side} x {side} grid"

    @classmethod
    def complete_settings(cls, config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
        """Refuse an unknown order and an MLP without layers."""
        if settings["order"] not in (PROJECT_FIRST, POOL_FIRST):
            raise ValueError(f"connector_config order={settings['order']!r} must be {PROJECT_FIRST} or {POOL_FIRST}.")
        if settings["mlp_layers"] < 1:
            raise ValueError(f"connector_config mlp_layers={settings['mlp_layers']} must be at least 1.")
        return settings

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, out_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.order = config.connector_config["order"]
        # CODEPATH: the two published orders have different projectors.
        if self.order == PROJECT_FIRST:
            self.mlp = FusedVLMConnectorMLP(width, out_width, config.connector_config["mlp_layers"])
        else:
            self.norm = nn.LayerNorm(width, eps=1e-5)
            self.gate_proj = nn.Linear(width, 3 * width)
            self.up_proj = nn.Linear(width, 3 * width)
            self.down_proj = nn.Linear(3 * width, out_width)

    def reduce(self, view_tokens: torch.Tensor, num_visual_tokens: int, *question: torch.Tensor) -> torch.Tensor:
        """(V, N, C) to (V, m, H)."""
        target = round(num_visual_tokens**0.5)
        # CODEPATH: the two published orders.
        if self.order == PROJECT_FIRST:
            return pool_tokens(self.mlp(view_tokens), target)
        pooled = self.norm(pool_tokens(view_tokens, target))
        return self.down_proj(nn.functional.silu(self.gate_proj(pooled)) * self.up_proj(pooled))


def pool_tokens(tokens: torch.Tensor, target: int) -> torch.Tensor:
    """(V, side x side, F) to (V, target x target, F) averages.

    Where `target` does not divide the side, the grid is first resized to the next multiple of it (bilinear, corners
    aligned, as TokenFLEX does).
    """
    grid = tokens_to_grid(tokens)
    side = grid.shape[-1]
    resized = -(-side // target) * target
    if resized != side:
        grid = nn.functional.interpolate(grid, size=(resized, resized), mode="bilinear", align_corners=True)
    return grid_to_tokens(nn.functional.avg_pool2d(grid, resized // target))

"""Dense: every patch of every view through LLaVA's MLP; the whole image, at its whole price."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from .modeling_fusedvlm_connector import FusedVLMConnector, register_connector
from .modeling_fusedvlm_connector_parts import FusedVLMConnectorMLP, grid_side


@register_connector("dense")
class FusedVLMDenseConnector(FusedVLMConnector):
    """All N patches of the layer before the last, through `mlp_layers` linear layers with GELU between (LLaVA-1.5).

    m is N, the patches of one view.
    """

    summary = "Every patch of every view becomes a token, through a small MLP (LLaVA)."
    settings = {"mlp_layers": 2}

    @classmethod
    def counts(cls, config: PreTrainedConfig) -> Sequence[int]:
        """N alone."""
        return (grid_side(config) ** 2,)

    @classmethod
    def explain_counts(cls, config: PreTrainedConfig) -> str:
        """Every patch is a token."""
        side = grid_side(config)
        return f"gives every patch of a {side} x {side} grid"

    @classmethod
    def complete_settings(cls, config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
        """Refuse an MLP without layers."""
        if settings["mlp_layers"] < 1:
            raise ValueError(f"connector_config mlp_layers={settings['mlp_layers']} must be at least 1.")
        return settings

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        layers = config.connector_config["mlp_layers"]
        self.mlp = FusedVLMConnectorMLP(config.vision_config.hidden_size, config.text_config.hidden_size, layers)

    def reduce(self, view_tokens: torch.Tensor, num_visual_tokens: int, *question: torch.Tensor) -> torch.Tensor:
        """(V, N, C) to (V, N, H)."""
        return self.mlp(view_tokens)

"""Resampler: M learned queries, of which any first m are used (Matryoshka Query Transformer)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, initialization as init

from .modeling_fusedvlm_connector import FusedVLMConnector, register_connector
from .modeling_fusedvlm_connector_parts import FusedVLMConnectorAttention, check_heads, sincos_grid, tokens_to_grid

POSITIONS, IMAGE = "positions", "image"


@register_connector("resampler")
class FusedVLMResamplerConnector(FusedVLMConnector):
    """One cross-attention from the first m of M = g x g queries to the patches, then a linear layer without bias.

    queries = LN(query + position), values = LN(patches); no residual, no feed-forward part, no interaction between
    queries, so that m tokens are the first m of more. `keys="positions"`, as published: keys are LN(positions) alone,
    the attention is the same for every image, and the whole is a learned linear pooling. `keys="image"`, our switch:
    keys are LN(positions + values), so that where a query looks depends on the image.

    The published code gives M tokens for m > M without a word; here that is refused.
    """

    summary = "Learned queries read the patches in one cross-attention (Matryoshka Query Transformer)."
    nested = True
    settings = {"num_queries": None, "num_heads": None, "keys": POSITIONS}

    @classmethod
    def counts(cls, config: PreTrainedConfig) -> Sequence[int]:
        """Any m up to the number of queries."""
        return range(1, config.connector_config["num_queries"] + 1)

    @classmethod
    def default_count(cls, config: PreTrainedConfig) -> int:
        """As many as there are queries, the paper's 256 at most."""
        return min(256, config.connector_config["num_queries"])

    @classmethod
    def complete_settings(cls, config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
        """By default as many queries as the smallest square that holds the largest m, and heads of 64."""
        width = config.vision_config.hidden_size
        largest = max(config.trained_num_visual_tokens or [config.num_visual_tokens or 256])
        queries = settings["num_queries"] or (math.isqrt(max(largest, 1) - 1) + 1) ** 2
        heads = settings["num_heads"] or max(1, width // 64)
        if queries < 1 or math.isqrt(queries) ** 2 != queries:
            raise ValueError(
                f"connector_config num_queries={queries} is not a square number, and queries stand on a square grid; "
                f"take {math.isqrt(max(queries, 0)) ** 2 or 1} or {(math.isqrt(max(queries, 0)) + 1) ** 2}."
            )
        if settings["keys"] not in (POSITIONS, IMAGE):
            raise ValueError(f"connector_config keys={settings['keys']!r} must be {POSITIONS} or {IMAGE}.")
        check_heads(cls.name, width, heads)
        return {**settings, "num_queries": queries, "num_heads": heads}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, settings = config.vision_config.hidden_size, config.connector_config
        self.keys = settings["keys"]
        self.query = nn.Parameter(torch.zeros(settings["num_queries"], width))
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.key_norm = nn.LayerNorm(width, eps=1e-6)
        self.value_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = FusedVLMConnectorAttention(width, settings["num_heads"])
        self.projection = nn.Linear(width, config.text_config.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02^2), as published."""
        init.normal_(self.query, std=0.02)

    def reduce(self, view_tokens: torch.Tensor, num_visual_tokens: int, *question: torch.Tensor) -> torch.Tensor:
        """(V, N, C) to (V, m, H)."""
        side = tokens_to_grid(view_tokens).shape[-1]
        places = self._positions(view_tokens)
        queries = self.query_norm(self.query[:num_visual_tokens] + places[:num_visual_tokens])
        values = self.value_norm(view_tokens)
        keys = resize_positions(places, side)
        # CODEPATH: keys as published, or keys that see the image.
        keys = self.key_norm(keys[None] + values if self.keys == IMAGE else keys[None])
        views = len(view_tokens)
        mixed = self.attention(queries.expand(views, -1, -1), keys.expand(views, -1, -1), values)
        return self.projection(mixed)

    def _positions(self, like: torch.Tensor) -> torch.Tensor:
        """(M, C) fixed positions of the queries' grid, rounded to float16 as the published table is."""
        table = sincos_grid(math.isqrt(len(self.query)), self.query.shape[1], like.device)
        return table.half().to(like.dtype)


def resize_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """(g x g, C) positions to (side x side, C), bicubic in float32."""
    own = math.isqrt(len(table))
    if own == side:
        return table
    grid = table.float().reshape(1, own, own, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(table.dtype)

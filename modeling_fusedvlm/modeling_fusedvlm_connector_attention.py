"""Attention and positions that several connectors are built from."""

import torch
from torch import nn


class FusedVLMConnectorAttention(nn.Module):
    """Multi-head attention from queries to keys and values of one width, with biases, as `nn.MultiheadAttention`.

    Its four products are linear layers of their own, so that adapters and counters see them.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, q, D), (B, k, D), (B, k, D) to (B, q, D); `mask` (B, k) is True where a key may be seen."""
        heads = (self.num_heads, -1)
        q = self.q_proj(queries).unflatten(-1, heads).transpose(1, 2)
        k = self.k_proj(keys).unflatten(-1, heads).transpose(1, 2)
        v = self.v_proj(values).unflatten(-1, heads).transpose(1, 2)
        mask = None if mask is None else mask[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FusedVLMConnectorBlock(nn.Module):
    """One transformer block with the norm in front: attention and a two-layer MLP, both with a residual."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.key_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = FusedVLMConnectorAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.up_proj = nn.Linear(width, mlp_ratio * width)
        self.down_proj = nn.Linear(mlp_ratio * width, width)

    def forward(self, queries: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, q, D) queries that look at (B, k, D); `mask` (B, k) is True where one may look."""
        keys = self.key_norm(seen)
        queries = queries + self.attention(self.query_norm(queries), keys, keys, mask)
        return queries + self.down_proj(nn.functional.gelu(self.up_proj(self.mlp_norm(queries))))


def sincos(positions: torch.Tensor, width: int) -> torch.Tensor:
    """(n,) positions to (n, width): sines, then cosines, of position times 10000^(-i / (width / 2))."""
    half = width // 2
    omega = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_grid(side: int, width: int, device: torch.device) -> torch.Tensor:
    """(side x side, width) in raster order: the column in the first half of the channels, the row in the second."""
    places = sincos(torch.arange(side, device=device), width // 2)
    columns = places[None].expand(side, -1, -1)
    rows = places[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def check_heads(connector: str, width: int, num_heads: int) -> None:
    """Raise `ValueError` when heads do not divide the width, or the width is no multiple of 4 (2-d sine positions)."""
    if num_heads < 1 or width % num_heads or width % 4:
        raise ValueError(
            f"connector_config num_heads={num_heads}: the {connector} connector needs a width that is a multiple of 4 "
            f"and of num_heads; the vision tower's is {width}."
        )

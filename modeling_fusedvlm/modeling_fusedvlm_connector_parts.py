"""Parts that connectors are built from: questions, MLPs, attention, positions and the patch grid.

Shape legend as in `modeling_fusedvlm_connector.py`.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers.utils import torch_compilable_check

from .modeling_fusedvlm_rows import FusionPlan


class FusedVLMConnectorAttention(nn.Module):
    """Multi-head attention from queries to keys and values of one width, with biases, as `nn.MultiheadAttention`.

    Its four products are linear layers of their own, so that adapters and counters see them.
    """

    def __init__(self, width: int, num_heads: int) -> None:
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

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
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


def grid_side(config: PreTrainedConfig) -> int:
    """Side of the tower's patch grid."""
    return config.vision_config.image_size // config.vision_config.patch_size


def split_questions(
    plan: FusionPlan, question_input_ids: torch.Tensor, device: torch.device | str
) -> list[torch.Tensor]:
    """Packed question ids, segment by segment. Raises `ValueError` when lengths and ids disagree."""
    lengths = [segment.num_question_tokens for segment in plan.segments]
    if sum(lengths) != len(question_input_ids):
        raise ValueError(
            f"question_lengths={lengths} adds up to {sum(lengths)}, but question_input_ids has "
            f"{len(question_input_ids)} tokens."
        )
    return list(question_input_ids.to(device, torch.long).split(lengths))


def refuse_query_rows(question_input_ids: torch.Tensor, first_query_token_id: int) -> None:
    """Raise `ValueError` when a question has the ids of queries, as that of another variant's query tokenizer may.

    Args:
        question_input_ids: (tokens,) ids of all questions.
        first_query_token_id: embedding row where the queries begin.
    """
    if len(question_input_ids):
        torch_compilable_check(
            (question_input_ids >= 0) & (question_input_ids < first_query_token_id),
            f"question_input_ids must be 0 to {first_query_token_id - 1}, the queries begin behind; these are another "
            "tokenizer's. Build the batch with the processor that was saved with this model.",
        )


@torch.no_grad()
def last_question_states(questions: list[torch.Tensor], language_model: nn.Module | None, name: str) -> torch.Tensor:
    """(G, H): the frozen LLM's last-layer state at the last token of each question.

    Questions are padded on the right and masked, so a question's state does not depend on the others.

    Raises:
        ValueError: when there is no LLM, as in stage 1.
    """
    if language_model is None:
        raise ValueError(f"The {name} connector reads questions with the LLM, which stage 1 does not have.")
    ids = pad_sequence(questions, batch_first=True)
    lengths = torch.tensor([len(question) for question in questions], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]).long()
    states = language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states[torch.arange(len(ids), device=states.device), lengths.to(states.device) - 1]


class FusedVLMConnectorMLP(nn.Module):
    """Linear layers of width `out_width` with exact GELU between them, LLaVA's `mlp{n}x_gelu`."""

    def __init__(self, width: int, out_width: int, num_layers: int) -> None:
        super().__init__()
        widths = [width] + [out_width] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.Linear(in_width, out_width) for in_width in widths)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., width) to (..., out_width)."""
        tokens = self.layers[0](tokens)
        for layer in self.layers[1:]:
            tokens = layer(nn.functional.gelu(tokens))
        return tokens


def tokens_to_grid(tokens: torch.Tensor) -> torch.Tensor:
    """(V, N, F) in raster order to (V, F, side, side). Raises `ValueError` when N is not a square number."""
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} view tokens are not a square grid.")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def grid_to_tokens(grid: torch.Tensor) -> torch.Tensor:
    """(V, F, h, w) to (V, h x w, F) in raster order."""
    return grid.flatten(2).transpose(1, 2)

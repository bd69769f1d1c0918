"""What a training-free reducer reads from a CLIP vision tower, for every view on its own.

Shape legend
    V   views, in any grouping: none of them sees another       P   patches of one view
    C   width of the tower                                      D   width of one attention head
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

Value = TypeVar("Value")
CLASS_TOKEN_TOWERS = ("clip_vision_model",)


@dataclass(frozen=True)
class TowerFeatures:
    """Features of one layer of a tower, and how that layer made them.

    Args:
        tokens: (V, P, C) patches, row by row over the grid.
        class_token: (V, 1, C).
        class_attention: (V, P) attention that the class token pays each patch in the layer read, mean over heads.
        keys: (V, P, D) keys of that layer, mean over heads.
        projected: (V, P, H) `tokens` behind the model's projector; only CDPruner reads it.
        question_similarity: (V, P) mean cosine of each patch with the question's rows; only CDPruner reads it.
    """

    tokens: torch.Tensor
    class_token: torch.Tensor | None = None
    class_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    question_similarity: torch.Tensor | None = None

    @property
    def num_patches(self) -> int:
        """P."""
        return self.tokens.shape[1]

    def with_question(self, projected: torch.Tensor, question_similarity: torch.Tensor) -> "TowerFeatures":
        """The same features with what a question-conditioned reducer reads."""
        return replace(self, projected=projected, question_similarity=question_similarity)


def there(value: Value | None) -> Value:
    """What a reducer cannot do without, and what its `needs` and `reads_question` ask for. Raises `ValueError`."""
    if value is None:
        raise ValueError(
            "The reducer needs features that were not read; see `needs` and `reads_question` of its class."
        )
    return value


def class_attention_of_layer(layer: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of a CLIP encoder layer's attention, whatever attention kernel the tower runs.

    Fused kernels (sdpa, flash) return no attentions; this row costs one query, so no tower has to be switched to eager.

    Args:
        layer: `CLIPEncoderLayer`.
        states: (V, P + 1, C) its input, class token first.

    Returns:
        (V, P) attention of the class token over the patches, mean over heads, the class token's own share left out as
        in the published reducers; (V, P, D) keys, mean over heads, bias included and unscaled.
    """
    attention, states = layer.self_attn, layer.layer_norm1(states)
    heads = attention.num_heads
    keys = attention.k_proj(states).unflatten(-1, (heads, -1))
    query = attention.q_proj(states[:, :1]).unflatten(-1, (heads, -1)) * keys.shape[-1] ** -0.5
    logits = torch.einsum("vqhd,vkhd->vhk", query, keys)
    weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(states.dtype)
    return weights.mean(1)[:, 1:], keys.mean(2)[:, 1:]


def read_tower(tower: Any, pixel_values: torch.Tensor, layer: int = -2) -> TowerFeatures:
    """Run a CLIP tower once.

    Args:
        tower: `CLIPVisionModel` of transformers, with any attention implementation.
        pixel_values: (V, 3, S, S), normalized.
        layer: index into `hidden_states` (0 embeddings, -1 last layer); LLaVA reads -2. Class attention and keys are
            those of the encoder layer that made these states.

    Raises:
        ValueError: for a tower without a class token, or a layer that no encoder layer made.
    """
    kind = tower.config.model_type
    if kind not in CLASS_TOKEN_TOWERS:
        raise ValueError(f"Reducers read a CLIP tower's class token; this tower is {kind!r} and has none.")
    number = check_layer(layer, tower.config.num_hidden_layers)
    states = tower(pixel_values.to(tower.dtype), output_hidden_states=True, return_dict=True).hidden_states
    made_by = getattr(tower, "vision_model", tower).encoder.layers[number - 1]
    attention, keys = class_attention_of_layer(made_by, states[number - 1])
    return TowerFeatures(states[number][:, 1:], states[number][:, :1], attention, keys)


def check_layer(layer: int, num_layers: int) -> int:
    """`layer` counted from the embeddings: 1 to num_layers. Raises `ValueError` for any other."""
    number = layer if not isinstance(layer, int) or layer >= 0 else num_layers + 1 + layer
    if not isinstance(number, int) or not 1 <= number <= num_layers:
        raise ValueError(f"layer={layer}: reducers read one layer, -{num_layers} to -1 (or 1 to {num_layers}).")
    return number

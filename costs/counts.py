"""Parameters, FLOPs and cache bytes by structure, from a config alone: no weights are made.

The model is built on the meta device and its matrix products are counted where they stand, so any vision tower and any
dense LLM counts. A multiply-add is two FLOPs. Softmax, norms, rotary embedding and activation functions are left out.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn

STRUCTURES = ("vision", "fusion", "projection", "llm")


@dataclass(frozen=True)
class Shapes:
    """What the FLOPs of a FusedVLM depend on; made by `read_shapes`. Widths in numbers, linear layers in weights.

    `vision_tokens` counts patches and class token of one view, `view_tokens` what one view gives the fusion module.
    """

    parameters: dict[str, int]
    vision_linear: int
    vision_layers: int
    vision_width: int
    vision_tokens: int
    patch_flops: int
    merge_flops: int
    view_tokens: int
    fusion_linear: int
    fusion_layers: int
    fusion_width: int
    projection_linear: int
    llm_linear: int
    llm_head: int
    llm_layers: int
    llm_width: int
    llm_kv_width: int

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, the frozen LLM included."""
        return sum(self.parameters.values())


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image and one question: `vision` encodes the views, `fusion` includes the projection, `prefill`
    reads the prompt and gives the first token, `decode_step` gives one further token."""

    vision: float
    fusion: float
    prefill: float
    decode_step: float

    @property
    def first_token(self) -> float:
        """All there is before the first token."""
        return self.vision + self.fusion + self.prefill

    def record(self) -> dict[str, float]:
        """JSON-ready, with the sum."""
        return {**asdict(self), "first_token": self.first_token}


def read_shapes(config) -> Shapes:
    """Shapes of a `FusedVLMConfig`; the default config is the paper's size."""
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration

    with torch.device("meta"):
        model = FusedVLMForConditionalGeneration(config)
    tower, merger, fuser = model.model.vision_tower, model.model.merger, model.model.fuser
    vision, text = config.vision_config, config.text_config
    grid = vision.image_size // vision.patch_size
    merged = (-(-grid // 2)) ** 2 if config.merge_views else grid * grid
    convolutions = [layer for layer in tower.modules() if isinstance(layer, nn.Conv2d)]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shapes(
        parameters={
            "vision": _count(tower) + _count(merger),
            "fusion": _count(fuser),
            "projection": _count(model.model.projector),
            "llm": _count(model.model.language_model) + (0 if config.tie_word_embeddings else _count(model.lm_head)),
        },
        vision_linear=_linear(tower),
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        vision_tokens=_vision_tokens(tower, grid),
        patch_flops=2 * grid * grid * sum(layer.weight.numel() for layer in convolutions),
        merge_flops=2 * merged * (merger.conv.weight.numel() if config.merge_views else 0),
        view_tokens=merged + int(config.newline_token),
        fusion_linear=_linear(fuser),
        fusion_layers=config.fuser_config.num_hidden_layers,
        fusion_width=config.fuser_config.hidden_size,
        projection_linear=_linear(model.model.projector),
        llm_linear=_linear(model.model.language_model),
        llm_head=model.lm_head.weight.numel(),
        llm_layers=text.num_hidden_layers,
        llm_width=text.num_attention_heads * head_dim,
        llm_kv_width=kv_heads * head_dim,
    )


def count_flops(
    shapes: Shapes,
    num_visual_tokens: int,
    num_views: int = 10,
    text_tokens: int = 35,
    question_tokens: int = 10,
    skip_masked: bool = True,
) -> Flops:
    """FLOPs of one image and one question.

    Args:
        shapes: from `read_shapes`.
        num_visual_tokens: m.
        num_views: global and local views of the image; 10 for 640x480 under HD-9.
        text_tokens: tokens of the LLM's prompt besides the visual ones; 35 is a short question in a chat template.
        question_tokens: tokens of the question that the fusion module reads; 0 without `fuse_question`.
        skip_masked: count causal attention as its lower triangle, what a fused kernel computes; False counts the full
            square, as torch's FLOP counter does.

    Raises:
        ValueError: m or num_views below 1, or a negative number of text tokens.
    """
    if min(num_visual_tokens, num_views) < 1 or min(text_tokens, question_tokens) < 0:
        raise ValueError(
            f"num_visual_tokens={num_visual_tokens}, num_views={num_views}, text_tokens={text_tokens}, "
            f"question_tokens={question_tokens}: need at least one visual token and view, and no negative length."
        )
    s, share = shapes, 0.5 if skip_masked else 1.0
    view = _view_flops(s)
    row = num_views * s.view_tokens + question_tokens + num_visual_tokens
    fusion = 2 * s.fusion_linear * row + share * 4 * s.fusion_layers * s.fusion_width * row**2
    prompt = num_visual_tokens + text_tokens
    attention = 4 * s.llm_layers * s.llm_width
    return Flops(
        vision=float(num_views * view),
        fusion=float(fusion + 2 * s.projection_linear * num_visual_tokens),
        prefill=float(2 * s.llm_linear * prompt + share * attention * prompt**2 + 2 * s.llm_head),
        decode_step=float(2 * (s.llm_linear + s.llm_head) + attention * (prompt + 1)),
    )


def count_training_flops(
    shapes: Shapes,
    num_views: int,
    fusion_lengths: list[int],
    prompt_lengths: list[int],
    num_visual_tokens: int,
    num_labels: int,
    vision_learns: bool = True,
) -> float:
    """Model FLOPs of a training step over one batch, forward and backward, nothing recomputed.

    A product's backward costs two forwards, one for its input and one for its weights; the frozen LLM has no use for
    the latter. Causal attention counts as its lower triangle.

    Args:
        shapes: from `read_shapes`.
        num_views: views of the batch; 0 when their features are cached.
        fusion_lengths: positions of each image's row in the fusion decoder: views, questions and queries.
        prompt_lengths: tokens of each prompt in the LLM; none in stage 1.
        num_visual_tokens: of the batch, for the projection.
        num_labels: positions whose logits are computed.
        vision_learns: whether the backward pass reaches the vision tower.
    """
    s = shapes
    view = _view_flops(s)
    squares = sum(length**2 for length in fusion_lengths)
    fusion = 2 * s.fusion_linear * sum(fusion_lengths) + 2 * s.fusion_layers * s.fusion_width * squares
    projection = 2 * s.projection_linear * num_visual_tokens
    llm_products = 2 * s.llm_linear * sum(prompt_lengths) + 2 * s.llm_head * num_labels
    llm_attention = 2 * s.llm_layers * s.llm_width * sum(length**2 for length in prompt_lengths)
    vision = (3 if vision_learns else 1) * num_views * view
    return float(vision + 3 * (fusion + projection) + 2 * llm_products + 3 * llm_attention)


def kv_cache_bytes(shapes: Shapes, num_tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of the LLM's key-value cache for `num_tokens` of one sequence, keys and values, all layers."""
    return 2 * shapes.llm_layers * shapes.llm_kv_width * num_tokens * bytes_per_number


def _view_flops(s: Shapes) -> int:
    """Forward FLOPs of the vision tower and the merge on one view."""
    attention = 4 * s.vision_layers * s.vision_width * s.vision_tokens**2
    return 2 * s.vision_linear * s.vision_tokens + attention + s.patch_flops + s.merge_flops


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _vision_tokens(tower: nn.Module, grid: int) -> int:
    """Patches and, where the tower has one, the class token."""
    return grid * grid + int(any(name.endswith("class_embedding") for name, _ in tower.named_parameters()))

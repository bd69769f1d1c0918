"""Parameters, FLOPs and cache bytes by structure, from a config alone: no weights are made.

The model is built on the meta device and its matrix products are counted where they stand, so any vision tower and any
dense LLM counts. A multiply-add is two FLOPs. Softmax, norms, rotary embedding and activation functions are left out.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMConnector, FusedVLMForConditionalGeneration


@dataclass(frozen=True)
class Shapes:
    """What the FLOPs of a FusedVLM depend on; made by `read_shapes`. Widths in numbers, linear layers in weights.

    `vision_tokens` counts patches and class token of one view; `connector` is the model's own, on the meta device, and
    counts itself.
    """

    parameters: dict[str, int]
    vision_linear: int
    vision_layers: int
    vision_width: int
    vision_tokens: int
    patch_flops: int
    connector: FusedVLMConnector
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
    """FLOPs of one image and one question: `vision` encodes the views, `fusion` is the connector with its projection
    (and the LLM's reading of the question for it, where it asks for that), `prefill` reads the prompt and gives the
    first token, `decode_step` gives one further token."""

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


def read_shapes(config: FusedVLMConfig) -> Shapes:
    """Shapes of a `FusedVLMConfig`; the default config is the paper's size."""
    with torch.device("meta"):
        model = FusedVLMForConditionalGeneration(config).requires_grad_(False)  # torch's counter hooks gradients
    tower, connector = model.model.vision_tower, model.model.connector
    vision, text = config.vision_config, config.text_config
    grid = vision.image_size // vision.patch_size
    convolutions = [layer for layer in tower.modules() if isinstance(layer, nn.Conv2d)]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shapes(
        parameters={
            "vision": _count(tower) + sum(_count(part) for part in connector.view_parts()),
            "fusion": sum(_count(part) for part in connector.fusion_parts()),
            "projection": sum(_count(part) for part in connector.projection_parts()),
            "llm": _count(model.model.language_model) + (0 if config.tie_word_embeddings else _count(model.lm_head)),
        },
        vision_linear=_linear(tower),
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        vision_tokens=_vision_tokens(tower, grid),
        patch_flops=2 * grid * grid * sum(layer.weight.numel() for layer in convolutions),
        connector=connector,
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
        num_visual_tokens: m; of each view, where the connector counts by view.
        num_views: global and local views of the image; 10 for 640x480 under HD-9.
        text_tokens: tokens of the LLM's prompt besides the visual ones; 35 is a short question in a chat template.
        question_tokens: tokens of the question that the connector reads; counted where it reads one.
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
    fusion = s.connector.image_flops(num_views, [question_tokens], [num_visual_tokens], share)
    placeholders = num_visual_tokens * (num_views if s.connector.per_view else 1)
    fusion += s.connector.projection_flops(placeholders) + _llm_flops(
        s, [s.connector.llm_tokens(question_tokens)], share
    )
    prompt = placeholders + text_tokens
    attention = 4 * s.llm_layers * s.llm_width
    return Flops(
        vision=float(num_views * _view_flops(s)),
        fusion=float(fusion),
        prefill=float(_llm_flops(s, [prompt], share) + 2 * s.llm_head),
        decode_step=float(2 * (s.llm_linear + s.llm_head) + attention * (prompt + 1)),
    )


@dataclass(frozen=True)
class ImageWork:
    """One image of a training batch: its views, and m and the question's length for each of its segments."""

    num_views: int
    question_lengths: Sequence[int]
    counts: Sequence[int]


def count_training_flops(
    shapes: Shapes,
    images: Sequence[ImageWork],
    prompt_lengths: Sequence[int],
    num_labels: int,
    vision_learns: bool = True,
    views_are_cached: bool = False,
) -> float:
    """Model FLOPs of a training step over one batch, forward and backward, nothing recomputed.

    A product's backward costs two forwards, one for its input and one for its weights; the frozen LLM has no use for
    the latter, and none at all for questions it reads on the connector's behalf. Causal attention counts as its lower
    triangle.

    Args:
        shapes: from `read_shapes`.
        images: what the connector does.
        prompt_lengths: tokens of each prompt in the LLM; none in stage 1, which has no projection either.
        num_labels: positions whose logits are computed.
        vision_learns: whether the backward pass reaches the vision tower.
        views_are_cached: whether the tower does not run at all.
    """
    s = shapes
    num_views = 0 if views_are_cached else sum(image.num_views for image in images)
    fusion = sum(s.connector.image_flops(i.num_views, i.question_lengths, i.counts, 0.5) for i in images)
    if prompt_lengths:
        copies = [image.num_views if s.connector.per_view else 1 for image in images]
        tokens = sum(copy * sum(image.counts) for copy, image in zip(copies, images, strict=True))
        fusion += s.connector.projection_flops(tokens)
    questions = [s.connector.llm_tokens(length) for image in images for length in image.question_lengths]
    llm_products = 2 * s.llm_linear * sum(prompt_lengths) + 2 * s.llm_head * num_labels
    llm_attention = 2 * s.llm_layers * s.llm_width * sum(length**2 for length in prompt_lengths)
    vision = (3 if vision_learns else 1) * num_views * _view_flops(s)
    return float(vision + 3 * fusion + 2 * llm_products + 3 * llm_attention + _llm_flops(s, questions, 0.5))


def _llm_flops(s: Shapes, lengths: Sequence[int], share: float) -> float:
    """Forward FLOPs of the LLM's decoder over rows of these lengths."""
    attention = share * 4 * s.llm_layers * s.llm_width
    return sum(2 * s.llm_linear * length + attention * length**2 for length in lengths)


def kv_cache_bytes(shapes: Shapes, num_tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of the LLM's key-value cache for `num_tokens` of one sequence, keys and values, all layers."""
    return 2 * shapes.llm_layers * shapes.llm_kv_width * num_tokens * bytes_per_number


def _view_flops(s: Shapes) -> float:
    """Forward FLOPs of one view to its view tokens."""
    attention = 4 * s.vision_layers * s.vision_width * s.vision_tokens**2
    linear = 2 * s.vision_linear * s.vision_tokens
    return linear + attention + s.patch_flops + s.connector.view_flops()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _vision_tokens(tower: nn.Module, grid: int) -> int:
    """Patches and, where the tower has one, the class token."""
    return grid * grid + int(any(name.endswith("class_embedding") for name, _ in tower.named_parameters()))

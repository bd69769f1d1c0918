"""Models with random weights for benchmarks: small ones of the paper's proportions, and its width with few layers."""

from typing import Any

import torch

from fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMFusionModel

PAPER_COUNTS = (1, 8, 16, 32, 64, 128, 256, 384, 512, 768)


def config(
    width: int = 128, vision_layers: int = 6, fusion_layers: int = 4, image_size: int = 336, **text: Any
) -> FusedVLMConfig:
    """Six vision layers to four of fusion cost about what the paper's 24 and 20 do to each other."""
    heads = max(2, width // 64)
    return FusedVLMConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": vision_layers, "num_attention_heads": heads, "image_size": image_size,
            "patch_size": 14,
        },
        fuser_config={
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": fusion_layers,
            "num_attention_heads": heads, "vocab_size": 1000 + 767, "eos_token_id": 999,
        },
        text_config={
            "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "vocab_size": 2000, "max_position_embeddings": 4096, **text,
        },
        first_query_token_id=1000, num_visual_tokens=256, trained_num_visual_tokens=[1, 768], image_token_id=5,
        fusion_row_per_turn=True,
    )  # fmt: skip


def fusion_model(**sizes: Any) -> FusedVLMFusionModel:
    """Vision tower and connector alone."""
    torch.manual_seed(0)
    return FusedVLMFusionModel(config(**sizes)).eval()


def whole_model(**sizes: Any) -> FusedVLMForConditionalGeneration:
    """With an LLM of four layers of width 128."""
    torch.manual_seed(0)
    return FusedVLMForConditionalGeneration(config(**sizes)).eval()


def pixels(views: int, image_size: int = 336) -> torch.Tensor:
    """Random views."""
    return torch.randn(views, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def question(length: int = 10) -> dict[str, Any]:
    """One question about one image."""
    return {"question_input_ids": torch.arange(100, 100 + length), "question_lengths": [length]}


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Over all pairs."""
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


def one_thread() -> None:
    """CPU time is compared on one thread."""
    torch.set_num_threads(1)

"""A tiny whole FusedVLM whose sizes all differ, built in seconds without downloads.

No two widths or counts are equal, so that a number which is right by coincidence cannot pass.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.processing import build_processor

OLDEST = transformers.__version__.startswith("5.18.")  # the oldest supported transformers, which lacks a few things
IMAGE_SIZE = 24  # patch 4: a 6 x 6 grid, 3 x 3 after the merge, 10 tokens per view
WIDTH = 32
LLM_WIDTH = 48
MAX_M = 12

CORPUS = [
    "what is in the image? a red cat sleeps on the sofa.",
    "describe the picture in detail, please. how many objects are there?",
    "USER: hello ASSISTANT: yes, no, maybe. 0123456789 [INST] <<SYS>> the quick brown fox jumps over the lazy dog",
]


def _byte_bpe(vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@lru_cache
def _text_tokenizer_json() -> str:
    return _byte_bpe(330, ["<pad>", "<s>", "</s>", "<image>"]).to_str()


def text_tokenizer() -> PreTrainedTokenizerFast:
    """LLM tokenizer: byte-level BPE, with a placeholder token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_text_tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
    )


@lru_cache
def _query_tokenizer_json() -> str:
    return _byte_bpe(280, ["<|endoftext|>"]).to_str()


def query_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the fusion module."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_query_tokenizer_json()),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def vision_config() -> CLIPVisionConfig:
    """A tiny CLIP tower."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=4,
        projection_dim=20,
    )


def save_backbones(folder: Path, seed: int = 0, llm_config=None, llm_dtype=None) -> tuple[str, str]:
    """Write a vision tower and an LLM with its tokenizer; returns their folders."""
    set_seed(seed)
    vision, llm = folder / "vision", folder / "llm"
    CLIPVisionModel(vision_config()).save_pretrained(vision)
    tokenizer = text_tokenizer()
    if llm_config is None:
        llm_config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=LLM_WIDTH,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=1024,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    model = AutoModelForCausalLM.from_config(llm_config)
    model.to(llm_dtype or torch.float32).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    return str(vision), str(llm)


def build_model(folder: Path, seed: int = 0, **kwargs) -> FusedVLMForConditionalGeneration:
    """Assemble a tiny variant from backbones in `folder`. Weights are large enough that images matter."""
    vision, llm = (
        (str(folder / "vision"), str(folder / "llm")) if (folder / "llm").exists() else save_backbones(folder, seed)
    )
    vision = kwargs.pop("vision", vision)
    set_seed(seed + 1)
    options = {
        "num_visual_tokens": 7,
        "num_followup_visual_tokens": 3,
        "trained_num_visual_tokens": [1, 7, MAX_M],
        "max_local_views": 2,
        "query_vocab_size": query_tokenizer().vocab_size,
        "query_eos_token_id": query_tokenizer().eos_token_id,
        "projector_initializer_range": 0.5,
        "fuser_config": {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 72,
            "initializer_range": 0.2,
        },
        **kwargs,
    }
    return FusedVLMForConditionalGeneration.from_backbones(vision, llm, **options).eval()


def build_tiny_processor(model, **kwargs):
    """The processor that belongs to `build_model`."""
    return build_processor(model.config, query_tokenizer=query_tokenizer(), **kwargs)


def build_contrastive_model(model, seed: int = 2) -> FusedVLMForContrastiveLearning:
    """A stage-1 model with the same vision and fusion sizes as `model`."""
    set_seed(seed)
    config = type(model.config).from_dict(
        {
            **model.config.to_dict(),
            "answer_config": CLIPTextConfig(
                vocab_size=query_tokenizer().vocab_size,
                hidden_size=40,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                eos_token_id=query_tokenizer().eos_token_id,
                bos_token_id=None,
                pad_token_id=query_tokenizer().eos_token_id,
            ).to_dict(),
            "projection_dim": 28,
        }
    )
    return FusedVLMForContrastiveLearning(config).eval()


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A random picture of coarse blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def user(*images, text: str) -> dict:
    """A user message with images and a question."""
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    """An assistant message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}

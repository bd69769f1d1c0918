"""Tiny models and inputs for transformers' test classes, built through the real processor."""

import torch
from transformers import CLIPTextConfig, LlamaConfig

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMFuserConfig
from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMProcessor, default_chat_template
from fusedvlm.tests import tiny


def build_config(**fields) -> FusedVLMConfig:
    """A self-contained config: the LLM inside, no reference."""
    tokenizer, query_tokenizer = tiny.text_tokenizer(), tiny.query_tokenizer()
    return FusedVLMConfig(
        vision_config=tiny.vision_config().to_dict(),
        fuser_config=FusedVLMFuserConfig(
            vocab_size=len(query_tokenizer) + 5,
            hidden_size=tiny.WIDTH,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=query_tokenizer.eos_token_id,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=tiny.LLM_WIDTH,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ).to_dict(),
        **{
            "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
            "num_visual_tokens": 5,
            "num_followup_visual_tokens": 3,
            "first_query_token_id": len(query_tokenizer),
            "max_local_views": 2,
            "projector_initializer_range": 0.5,
            **fields,
        },
    )


def answer_config() -> dict:
    """Text tower of stage 1."""
    tokenizer = tiny.query_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    ).to_dict()


def build_processor(chat_template: str | None = None, max_local_views: int = 2) -> FusedVLMProcessor:
    """The processor that belongs to `build_config`."""
    return FusedVLMProcessor(
        FusedVLMImageProcessor(size={"height": 24, "width": 24}, max_local_views=max_local_views),
        tiny.text_tokenizer(),
        tiny.query_tokenizer(),
        num_visual_tokens=5,
        num_followup_visual_tokens=3,
        chat_template=chat_template or default_chat_template(None),
    )


def build_inputs(batch_size: int = 7) -> dict:
    """Conversations with one image each, of the same size and with questions of the same length.

    Packed inputs have no batch axis. With equal shares, the tests that cut rows off by dividing axis 0 cut whole
    samples; batches of unequal samples are tested elsewhere (`test_modeling.py`).
    """
    text = [f"<image><|question|>what is {row}?<|/question|>" for row in range(batch_size)]
    images = [[tiny.picture(row)] for row in range(batch_size)]
    return dict(build_processor()(images=images, text=text, padding=True, return_tensors="pt"))


def build_contrastive_inputs(batch_size: int = 7) -> dict:
    """The same without prompts, and an answer of the same length for each question."""
    inputs = build_inputs(batch_size)
    for name in ("input_ids", "attention_mask"):
        inputs.pop(name)
    tokenizer = tiny.query_tokenizer()
    answers = [[*tokenizer(f"a cat {row}").input_ids, tokenizer.eos_token_id] for row in range(batch_size)]
    inputs["answer_input_ids"] = torch.tensor(answers)
    inputs["answer_attention_mask"] = torch.ones_like(inputs["answer_input_ids"])
    return inputs

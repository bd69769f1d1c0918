"""Chat templates of the published model (docs/reference.md, "Prompts"), one Jinja body with the words of each family.

The published code tokenizes a conversation piece by piece and decides piece by piece what is learned. The templates
render those pieces with the processor's markers; tests compare every token and every label with the published parser.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
HELPFUL = "You are a helpful assistant."
LLAMA_2 = {
    "start": "<s>",
    "system": ["[INST] <<SYS>>\n", "\n<</SYS>>\n\n"],
    "user": "<s>[INST]",
    "first_user": "",  # the system piece has opened the turn
    "first_question": "[INST] ",  # without a system piece the question itself opens it, and visual tokens precede it
    "user_end": "[/INST]",
    "answer_end": " ",
    "eos": "</s>",
}
LLAMA_3 = {
    "start": "<|begin_of_text|>",
    "system": ["<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"],
    "user": "<|start_header_id|>user<|end_header_id|>\n\n",
    "user_end": "<|eot_id|>",
    "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "eos": "<|eot_id|>",
}
PHI_3 = {
    "system": ["<|system|>\n", "<|end|>\n"],
    "user": "<|user|>\n",
    "user_end": "<|end|>\n",
    "user_end_is_learned": True,  # published: the end of the user's turn is typed EOS like that of an answer
    "assistant": "<|assistant|>\n",
    "eos": "<|end|>\n",
}
STYLES: dict[str, dict[str, Any]] = {
    "llama-2": LLAMA_2,
    "llama-2-vision": {**LLAMA_2, "default_system": VICUNA},
    "vicuna_v1.1": {
        "start": "<s>",
        "default_system": VICUNA,
        "system": ["", " "],
        "no_system": " ",
        "user": "USER: ",
        "user_end": " ",
        "assistant": "ASSISTANT: ",
        "prompt": "ASSISTANT:",
        "eos": "</s>",
    },
    "qwen-7b-chat": {
        "default_system": HELPFUL,
        "system": ["<|im_start|>system\n", "<|im_end|>\n"],
        "user": "<|im_start|>user\n",
        "user_end": "<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n",
        "eos": "<|im_end|>\n",
    },
    "microsoft-phi-3": PHI_3,
    "phi-3": {**PHI_3, "default_system": HELPFUL, "system": ["", ""]},
    "llama-3": LLAMA_3,
    "llama-3-vision": {**LLAMA_3, "default_system": HELPFUL},
}
EMPTY: dict[str, Any] = {
    "start": "",
    "default_system": "",
    "system": ["", ""],
    "no_system": "",
    "user": "",
    "first_user": None,
    "first_question": "",
    "user_end": "",
    "user_end_is_learned": False,
    "assistant": "",
    "prompt": None,
    "answer_end": "",
    "eos": "",
}


def published_chat_template(name: str) -> str:
    """Jinja template of a published conversation style.

    Two variables can be given to `apply_chat_template`: `published_labels=True` also learns the end of the user's turn
    where the published code does (Phi-3), and `published_inference=True` lets the fusion module read the "[INST] " of
    llama-2 without a system message, as published inference (not training) does.

    Raises:
        ValueError: listing the names there are.
    """
    if name not in STYLES:
        raise ValueError(f"Unknown conversation {name!r}; there are {', '.join(STYLES)}.")
    style: dict[str, Any] = EMPTY | STYLES[name]
    if style["first_user"] is None:
        style["first_user"] = style["user"]
    if style["prompt"] is None:
        style["prompt"] = style["assistant"]
    lines = [f"{{%- set {key} = {_jinja(value)} -%}}" for key, value in style.items()]
    body = (Path(__file__).parent / "published_chat.jinja").read_text(encoding="utf-8")
    return "\n".join([f"{{#- Conversation style {name} of the published checkpoints. -#}}", *lines, body])


def _jinja(value: Any) -> str:
    """A Python string, list or boolean as a Jinja literal (JSON's are the same, escapes of newlines included)."""
    return json.dumps(value, ensure_ascii=False)


def choose_conversation(tokenizer: PreTrainedTokenizerBase) -> str:
    """The published conversation style that an LLM's vocabulary calls for."""
    vocabulary = tokenizer.get_vocab()
    for token, name in (
        ("<|start_header_id|>", "llama-3-vision"),
        ("<|im_start|>", "qwen-7b-chat"),
        ("<|end|>", "microsoft-phi-3"),
    ):
        if token in vocabulary:
            return name
    return "llama-2-vision"

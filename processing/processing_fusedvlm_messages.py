"""Conversations as applications hand them over, looked at before a chat template sees them.

A template passes over what it does not know: a video, a part without a type, a second system message, a text that is
None. The answer would then be to something else than what was asked, so all of that is refused, in one line each.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "url", "path", "base64")
IMAGE_TYPES = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, np.ndarray, torch.Tensor)
OWN_TEMPLATE = "messages if message.role != 'system'"  # in every template of this package, and in no other


def check_conversations(conversation: Any, template: str) -> None:
    """Refuse what a template would lose or stumble over.

    Args:
        conversation: one conversation, or a list of them, as `apply_chat_template` takes it.
        template: the chat template's text. Those of this package know three roles and one system message, the first;
            an LLM's own may know more.

    Raises:
        ValueError: naming the message, and the conversation where there are several.
    """
    if not is_sequence(conversation) or not conversation:
        raise ValueError(f"A conversation is a list of messages, one at least; got {shown(conversation)}.")
    is_batch = is_sequence(conversation[0])
    for number, messages in enumerate(conversation if is_batch else [conversation]):
        where = f"Conversation {number}, message" if is_batch else "Message"
        if not is_sequence(messages) or not messages:
            raise ValueError(f"Conversation {number} is a list of messages, one at least; got {shown(messages)}.")
        for place, message in enumerate(messages):
            _check_message(message, place, f"{where} {place}", OWN_TEMPLATE in template)
        roles = [message["role"] for message in messages]
        if OWN_TEMPLATE in template and roles[0] == "system" and "user" not in roles:
            raise ValueError(f"{where} 0 is from the system and stands in the first question, but no user asks one.")


def check_text(text: str, where: str) -> None:
    """Refuse text that cannot be written down: half a character of two, as broken JSON escapes leave it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} of the text is half of a pair, which is no text.") from None


def is_sequence(value: Any) -> bool:
    """Whether a value is a list of things rather than a text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def shown(value: Any) -> str:
    """A value as messages show it: one short line."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None), list, dict)) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"


def _check_message(message: Any, place: int, where: str, is_own_template: bool) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a mapping with role and content, got {shown(message)}.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or (is_own_template and role not in ROLES):
        raise ValueError(f"{where} has role {shown(role)}; use one of {', '.join(ROLES)}.")
    if is_own_template and role == "system" and place:
        raise ValueError(f"{where} is from the system; only the first message can be.")
    if content is None and message.get("tool_calls") and not is_own_template:
        return
    if isinstance(content, str):
        check_text(content, where)
        return
    if not is_sequence(content):
        raise ValueError(f"{where} ({role}): content must be text or a list of parts, got {shown(content)}.")
    for number, part in enumerate(content or ()):
        _check_part(part, f"{where} ({role}), part {number}")
        if is_own_template and role != "user" and part["type"] != "text":
            raise ValueError(f"{where} ({role}), part {number} is an image; images belong to the user's messages.")


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: text must be text, got {shown(part.get('text'))}.")
        check_text(part["text"], where)
    elif kind == "image":
        given = {key: part[key] for key in IMAGE_KEYS if part.get(key) is not None}
        if len(given) > 1:
            raise ValueError(f"{where}: give one of {', '.join(given)}, they would be {len(given)} images.")
        for key, value in given.items():
            if not _may_be_image(value):
                raise ValueError(
                    f"{where}: {key} must be a picture, array, path, URL, base64 string, bytes or open file, got "
                    f"{shown(value)}."
                )
    elif kind == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, Mapping) else address
        if not isinstance(address, str):
            raise ValueError(f"{where}: image_url needs a url, got {shown(part.get('image_url'))}.")
    else:
        what = f"type {shown(kind)}" if isinstance(part, Mapping) else f"{shown(part)}, which is no part"
        raise ValueError(f"{where} is of {what}; this model reads text, image and image_url parts.")


def _may_be_image(value: Any) -> bool:
    """Whether the image processor can read something of this kind: open files, rows of `datasets` and arrays, too."""
    if isinstance(value, Mapping):
        return "bytes" in value
    return isinstance(value, IMAGE_TYPES) or callable(getattr(value, "read", None)) or hasattr(value, "__array__")

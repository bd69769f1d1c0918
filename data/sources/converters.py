"""Rows of public datasets to samples of the one conversation format. Pure functions: no files are read here.

A converter takes one row and gives its samples (`{"id", "images", "messages"}`, see `fusedvlm.data.records`), or raises
`ValueError` naming the field and what is wrong with it; the reader adds the file and the row.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

from fusedvlm.data.records import ROLES, as_parts, plain_image
from fusedvlm.wording import fit, shown

Sample = dict[str, Any]
Converter = Callable[..., Iterator[Sample]]

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def from_llava(row: dict) -> Iterator[Sample]:
    """LLaVA-1.5's layout (`llava_v1_5_mix665k.json`): `id`, `image` (absent in text-only rows), `conversations`.

    Each `<image>` in a text is an image's place; when there is none the image goes in front of the first question.
    Answers in front of the first question are left out, as LLaVA's own trainer does.
    """
    turns = [(speaker(turn, "from"), text_field(turn, "value")) for turn in list_field(row, "conversations")]
    images = [plain_image(image) for image in as_list(row.get("image"))]
    while turns and turns[0][0] == "assistant":
        turns.pop(0)
    messages = [{"role": role, "content": place_images(text, "<image>")} for role, text in turns]
    yield finish(row.get("id"), images, messages)


def from_svit(row: dict, turns_per_sample: int | None = None) -> Iterator[Sample]:
    """SVIT's own layout (`data/*.zip`): `image_id`, `conversations` of `content` lists of `from` user and gpt.

    Args:
        row: one image's conversations. The image is given by number; the reader finds its file.
        turns_per_sample: join an image's conversations and cut them after so many answers; by default each conversation
            is one sample (complex reasoning and referring QA have one answer per conversation).
    """
    conversations = []
    for conversation in list_field(row, "conversations"):
        turns = [(speaker(turn, "from"), text_field(turn, "value")) for turn in list_field(conversation, "content")]
        conversations.append([{"role": role, "content": as_parts(text)} for role, text in turns])
    if row.get("image_id") is None:
        raise ValueError("field 'image_id' is missing.")
    if turns_per_sample is not None:
        joined = [message for messages in conversations for message in messages]
        step = 2 * turns_per_sample
        conversations = [joined[start : start + step] for start in range(0, len(joined), step)]
    for number, messages in enumerate(conversations):
        yield finish(f"{row['image_id']}-{number}", [f"{row['image_id']}.jpg"], messages)


def from_docdownstream(row: dict) -> Iterator[Sample]:
    """mPLUG DocDownstream-1.0's layout (`train.jsonl`): `image` list, `messages` with `<|image|>`, `task_name`."""
    turns = [(speaker(turn, "role"), text_field(turn, "content")) for turn in list_field(row, "messages")]
    messages = [{"role": role, "content": place_images(text, "<|image|>")} for role, text in turns]
    yield finish(row.get("id"), [plain_image(image) for image in as_list(row.get("image"))], messages)


def from_chat(row: dict) -> Iterator[Sample]:
    """Any chat dataset: TRL's vision format, OpenAI's `image_url` parts, or LLaVA's `conversations`.

    Images come from the `images` or `image` column (path, bytes, `{"path", "bytes"}`, PIL image, or a list of them) or
    stand inside the parts. `prompt` and `completion` message lists are joined.
    """
    if isinstance(row, dict) and "conversations" in row and "messages" not in row:
        yield from from_llava({**row, "image": row.get("image") or row.get("images")})
        return
    if isinstance(row, dict) and "messages" not in row and "prompt" in row:
        row = {**row, "messages": list_field(row, "prompt") + list_field(row, "completion")}
    list_field(row, "messages")
    columns = [plain_image(image) for name in ("images", "image") for image in as_list(row.get(name))]
    inline: list[Any] = []
    messages = []
    for number, message in enumerate(row["messages"]):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, (str, list)):
            raise ValueError(f"field 'messages[{number}].content' must be text or a list of parts.")
        if isinstance(content, str) and columns:  # some datasets mark the place as LLaVA does
            content = place_images(content, "<image>")
        parts = [read_part(part, inline, f"messages[{number}]") for part in as_parts(content)]
        messages.append({"role": message.get("role"), "content": parts})
    if columns and inline:
        raise ValueError(
            f"{len(columns)} images in a column and {len(inline)} inside the messages; use one of the two."
        )
    yield finish(row.get("id"), columns or inline, messages)


def read_part(part: Any, inline: list[Any], where: str) -> dict[str, str]:
    """A content part as `image` or `text`; an image that stands inside it goes to `inline`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, dict) else address
        if not isinstance(address, str):
            raise ValueError(f"field '{where}' has an image_url part without a url.")
        inline.append(address)
        return {"type": "image"}
    if kind == "image":
        found = [part[key] for key in ("image", "path", "url", "base64") if part.get(key) is not None]
        inline.extend(plain_image(image) for image in found[:1])
        return {"type": "image"}
    raise ValueError(f"field '{where}' has a part of type {shown(kind)}; use text, image or image_url parts.")


def place_images(text: str, marker: str) -> list[dict[str, str]]:
    """Text with image markers as parts; the line break between a marker and the text around it goes.

    >>> place_images("<image>\\nWhat is it?", "<image>")
    [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
    """
    if marker not in text:
        return as_parts(text)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(marker)):
        if number:
            parts.append({"type": "image"})
        piece = piece.strip("\n") if piece.strip() else ""
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def finish(identifier: Any, images: list[Any], messages: list[dict]) -> Sample:
    """Check what all layouts have in common: who speaks when, no empty answers, as many places as images.

    Raises:
        ValueError: naming the message.
    """
    dialogue = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not dialogue:
        raise ValueError("no messages.")
    for number, message in enumerate(dialogue):
        role, expected = message["role"], ("user", "assistant")[number % 2]
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {number} has role {shown(role)}; use one of {', '.join(ROLES)}.")
        if role != expected:
            raise ValueError(f"message {number} is from the {role}, expected one from the {expected}: turns alternate.")
        if not any(part["type"] == "image" or part["text"].strip() for part in message["content"]):
            raise ValueError(f"message {number} ({role}) is empty.")
        if role != "user" and any(part["type"] == "image" for part in message["content"]):
            raise ValueError(f"message {number} ({role}) shows an image; only questions can.")
    if len(dialogue) % 2:
        raise ValueError("the last question has no answer.")
    for image in images:
        if not isinstance(image, (str, bytes, os.PathLike)) and not hasattr(image, "convert"):
            raise ValueError(f"an image is {shown(image)}; give a path, URL, bytes or picture.")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images and not places:
        dialogue[0]["content"] = [{"type": "image"}] * len(images) + dialogue[0]["content"]
    elif places != len(images):
        raise ValueError(f"{len(images)} images, but {places} places for images in the messages.")
    return {"id": "" if identifier is None else str(identifier), "images": images, "messages": messages}


def speaker(turn: Any, field: str) -> str:
    """Role of a turn.

    Raises:
        ValueError: for an unknown speaker.
    """
    name = turn.get(field) if isinstance(turn, dict) else None
    if not isinstance(name, str) or name not in SPEAKERS:
        raise ValueError(f"field '{field}' of a turn is {shown(name)}; expected one of {', '.join(SPEAKERS)}.")
    return SPEAKERS[name]


def text_field(turn: dict, field: str) -> str:
    """Text of a turn.

    Raises:
        ValueError: when it is not text.
    """
    if not isinstance(turn.get(field), str):
        raise ValueError(f"field '{field}' of a turn must be text, got {type(turn.get(field)).__name__}.")
    return turn[field]


def list_field(row: Any, field: str) -> list:
    """A field that must be a list.

    Raises:
        ValueError: when it is not, or the row is not an object.
    """
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with a field {field!r}, got {type(row).__name__}.")
    if not isinstance(row.get(field), list):
        known = fit(", ".join(map(str, list(row)[:8])), 120)
        raise ValueError(f"field {field!r} must be a list, got {type(row.get(field)).__name__}; fields here: {known}.")
    return row[field]


def as_list(value: Any) -> list:
    """One or several images as a list; nothing is an empty list."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


CONVERTERS: dict[str, Converter] = {
    "llava": from_llava,
    "svit": from_svit,
    "docdownstream": from_docdownstream,
    "chat": from_chat,
    "parquet": from_chat,
    "webdataset": from_chat,
}

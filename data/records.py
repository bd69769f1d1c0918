"""One conversation format for training, the one TRL's vision trainers use.

    {"images": [image, ...],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}, ...]}

An image is a PIL image, a path, a URL or a base64 string. Contents may be plain strings; images that no message places
go in front of the first user message. `view_features` (views, tokens per view, width) may stand in for `images` when
the vision tower is frozen and its output is cached.
"""

from typing import Any

ROLES = ("system", "user", "assistant")


def as_parts(content: str | list[dict]) -> list[dict]:
    """Message content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def normalize_sample(sample: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """Check one sample and put its images where its messages show them.

    Args:
        sample: see the module's docstring.
        index: number of the sample, for messages.

    Returns:
        `{"images": [...], "messages": [...]}` with every content a list of parts and as many image parts as images.

    Raises:
        ValueError: naming the sample and what is wrong with it.
    """
    messages = [
        _normalize_message(message, number, index) for number, message in enumerate(sample.get("messages") or [])
    ]
    if not messages:
        raise ValueError(f"Sample {index}: no messages.")
    try:
        images = [plain_image(image) for image in sample.get("images") or []]
    except ValueError as error:
        raise ValueError(f"Sample {index}: {error}") from None
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images and shown == 0:
        first_user = next((message for message in messages if message["role"] == "user"), None)
        if first_user is None:
            raise ValueError(f"Sample {index}: {len(images)} images but no user message to show them in.")
        first_user["content"] = [{"type": "image"}] * len(images) + first_user["content"]
        shown = len(images)
    if images and shown != len(images):
        raise ValueError(f"Sample {index}: {len(images)} images but {shown} image parts in its messages.")
    return {"images": images, "messages": messages}


def _normalize_message(message: Any, number: int, index: int) -> dict[str, Any]:
    """A message with its content as parts.

    Raises:
        ValueError: naming the message that is none.
    """
    where = f"Sample {index}: message {number}"
    if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list, tuple)):
        raise ValueError(f"{where} must have a role and a content, text or a list of parts.")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where} has role {message.get('role')!r}; use one of {ROLES}.")
    parts = as_parts(message["content"])
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"{where} has a part of type {kind!r}; use text parts with their text, and image parts.")
    return {**message, "content": parts}


def plain_image(image: Any) -> Any:
    """An image as `load_image` takes it: of an image column's `{"bytes", "path"}` what is there.

    Raises:
        ValueError: for an image that has neither.
    """
    if not isinstance(image, dict):
        return image
    content = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if content is None:
        raise ValueError(f"an image has neither bytes nor a path, but {', '.join(map(str, image)) or 'nothing'}.")
    return content


def text_of(message: dict) -> str:
    """All text of a message, parts joined by a line break."""
    return "\n".join(part["text"] for part in as_parts(message["content"]) if part["type"] == "text")


def answers_per_segment(messages: list[dict]) -> list[str]:
    """The answer to each (image, question) segment, image by image and then by turn: the model's segment order.

    Raises:
        ValueError: when a question about an image has no answer.
    """
    introduced: list[int] = []  # turn in which each image first appears
    answers: list[str | None] = []
    for message in messages:
        if message["role"] == "user":
            new = sum(part["type"] == "image" for part in as_parts(message["content"]))
            introduced.extend([len(answers)] * new)
            answers.append(None)
        elif message["role"] == "assistant" and answers:
            answers[-1] = text_of(message)
    segments = [answers[turn] for first in introduced for turn in range(first, len(answers))]
    given = [answer for answer in segments if answer is not None]
    if len(given) < len(segments):
        raise ValueError("Stage 1 needs an answer to every question about an image.")
    return given

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


def normalise_sample(sample: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """Check one sample and put its images where its messages show them.

    Args:
        sample: see the module's docstring.
        index: number of the sample, for messages.

    Returns:
        `{"images": [...], "messages": [...]}` with every content a list of parts and as many image parts as images.

    Raises:
        ValueError: naming the sample and what is wrong with it.
    """
    messages = [{**message, "content": as_parts(message["content"])} for message in sample.get("messages") or []]
    if not messages:
        raise ValueError(f"Sample {index}: no messages.")
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(f"Sample {index}: message {number} has role {message['role']!r}; use one of {ROLES}.")
    images = list(sample.get("images") or [])
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
    if any(answer is None for answer in segments):
        raise ValueError("Stage 1 needs an answer to every question about an image.")
    return segments

"""What the OpenAI chat interface sends and gets, checked field by field; what cannot be done is said."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

IGNORED = {
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "extra_headers", "n", "logprobs", "top_logprobs", "tools", "tool_choice", "functions",
    "function_call", "response_format", "modalities", "presence_penalty", "frequency_penalty", "audio", "prediction",
    "reasoning_effort", "verbosity", "web_search_options",
}  # fmt: skip
# Of these only the value that changes nothing is taken.
NEUTRAL = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "presence_penalty": (0,), "frequency_penalty": (0,), "audio": (), "prediction": (),
    "web_search_options": (),
}  # fmt: skip
KNOWN = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "stream", "stream_options", "chat_template_kwargs", "logit_bias", "return_token_ids", "ignore_eos",
}  # fmt: skip
COUNTS = ("num_visual_tokens", "num_followup_visual_tokens")
WHERE_M_BELONGS = 'chat_template_kwargs={"processor_kwargs": {"num_visual_tokens": 4}}'
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and one line for the user."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect errors."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code or self.status}}


def wrong(message: str) -> ApiError:
    """The user's mistake."""
    return ApiError(400, message)


@dataclass
class Sampling:
    """How tokens are chosen; greedy where no temperature is given."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # as load generators ask: answers of exactly `max_tokens`


@dataclass
class ChatRequest:
    """A checked request. `images` are the addresses of `conversation`'s images, in its order."""

    conversation: list[dict]
    images: list[Any]
    sampling: Sampling
    num_visual_tokens: int | str | None = None
    num_followup_visual_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    model: str | None = None


@dataclass
class Usage:
    """Tokens of a request; `visual` are those of the prompt that stand for images, `cached` those not read again."""

    prompt: int = 0
    visual: int = 0
    completion: int = 0
    cached: int = 0

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form, with `visual_tokens` beside `cached_tokens`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached, "visual_tokens": self.visual},
        }


def read_request(body: bytes, max_images: int) -> ChatRequest:
    """Parse and check the body of a chat completion.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise wrong(f"The body is no JSON: {str(error)[:120]}.") from None
    if not isinstance(data, dict):
        raise wrong("The body must be one JSON object with messages.")
    _check_fields(data)
    conversation, images = _read_messages(data.get("messages"))
    if len(images) > max_images:
        raise wrong(f"The request has {len(images)} images; at most {max_images} are taken.")
    counts = _read_counts(data.get("chat_template_kwargs"))
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise wrong("stream_options must be an object.")
    return ChatRequest(
        conversation,
        images,
        _read_sampling(data),
        stream=_flag(data, "stream"),
        include_usage=bool(options.get("include_usage")),
        return_token_ids=_flag(data, "return_token_ids"),
        model=data.get("model"),
        **counts,
    )


def _check_fields(data: dict) -> None:
    for name in COUNTS:
        if name in data:
            raise wrong(f"{name} stands at the wrong place; send extra_body={{{WHERE_M_BELONGS!r}}}.")
    for name, value in data.items():
        if name in KNOWN or value is None:
            continue
        if name not in IGNORED:
            raise wrong(f"{name[:60]!r} is not a field that this server knows.")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise wrong(f"{name}={str(value)[:60]} is not supported by this server; leave it out.")
    if data.get("logit_bias"):
        raise wrong("logit_bias is not supported by this server; leave it out.")


def _read_messages(messages: Any) -> tuple[list[dict], list[Any]]:
    if not isinstance(messages, list) or not messages:
        raise wrong("messages must be a list of at least one message.")
    conversation, images = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise wrong(f"Message {number} needs a role: system, user or assistant.")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise wrong(f"Message {number}: content must be text or a list of parts.")
        parts = []
        for part in content:
            if isinstance(part, dict) and part.get("type") == "image_url":
                address = part.get("image_url")
                images.append(address.get("url") if isinstance(address, dict) else address)
                parts.append({"type": "image"})
            elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            else:
                kind = part.get("type") if isinstance(part, dict) else part
                raise wrong(f"Message {number} has a part of type {kind!r:.60}; text and image_url are read.")
        conversation.append({"role": ROLES[message["role"]], "content": parts})
    return conversation, images


def _read_counts(kwargs: Any) -> dict[str, int]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict) or set(kwargs) - {"processor_kwargs"}:
        raise wrong(f"chat_template_kwargs takes processor_kwargs alone, as in {WHERE_M_BELONGS}.")
    counts = kwargs.get("processor_kwargs") or {}
    if not isinstance(counts, dict) or set(counts) - set(COUNTS):
        raise wrong(f"processor_kwargs takes {' and '.join(COUNTS)}, as in {WHERE_M_BELONGS}.")
    for name, value in counts.items():
        is_auto = (name, value) == ("num_visual_tokens", "auto")  # chosen from the first question, where calibrated
        if not is_auto and (isinstance(value, bool) or not isinstance(value, int)):
            raise wrong(f"{name}={str(value)[:60]!r} is not a whole number of visual tokens.")
    return counts


def _read_sampling(data: dict) -> Sampling:
    longest = data.get("max_completion_tokens")
    longest = data.get("max_tokens") if longest is None else longest
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise wrong(f"max_tokens={str(longest)[:60]} must be a whole number from 1.")
    stop = data.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops) or len(stops) > 16:
        raise wrong("stop must be a text or a list of at most 16 texts, none of them empty.")
    seed = data.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise wrong(f"seed={str(seed)[:60]} must be a whole number.")
    top_k = data.get("top_k")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < -1):
        raise wrong(f"top_k={str(top_k)[:60]} must be a whole number, 0 for no limit.")
    return Sampling(
        longest,
        _number(data, "temperature", 0.0, 0.0, 2.0),
        _number(data, "top_p", 1.0, 1e-6, 1.0),
        max(top_k or 0, 0),
        seed,
        tuple(stops),
        _flag(data, "ignore_eos"),
    )


def _number(data: dict, name: str, default: float, least: float, most: float) -> float:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise wrong(f"{name}={str(value)[:60]} must be a number from {least:g} to {most:g}.")
    return float(value)


def _flag(data: dict, name: str) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{name}={str(value)[:60]} must be true or false.")
    return bool(value)


@dataclass
class Reply:
    """An answer on its way: writes the documents of a stream, or the one at the end."""

    model: str
    usage: Usage
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "stop"

    def _frame(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, with_ids: bool) -> dict[str, Any]:
        """The document of an answer that is complete."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        ids = {"token_ids": self.token_ids} if with_ids else {}
        return {**self._frame("chat.completion", [{**choice, **ids}]), "usage": self.usage.as_dict()}

    def chunk(self, text: str | None = None, is_first: bool = False, is_last: bool = False) -> dict[str, Any]:
        """One document of a stream."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if is_first else {}
        if text is not None:
            delta["content"] = text
        finish = self.finish_reason if is_last else None
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._frame("chat.completion.chunk", [choice])

    def usage_chunk(self) -> dict[str, Any]:
        """The last document of a stream that was asked for its usage."""
        return {**self._frame("chat.completion.chunk", []), "usage": self.usage.as_dict()}

"""Ask a language model: any OpenAI-compatible endpoint, or transformers on this machine."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

Messages = list[dict[str, Any]]
Ask = Callable[[Messages], str]

CONFIGURATION = (401, 402, 404, 405, 407)  # the key, the account, the address: no other request will fare better
PASSING = (408, 409, 425, 429)  # and everything from 500: worth another try
LONGEST_WAIT = 60.0  # seconds between tries of our own accord
LONGEST_ASKED = 900.0  # seconds that a server may ask for in all, per request
CONTENT_STOPS = ("content_filter", "refusal")


class Unanswered(OSError):
    """A request that stayed without a usable answer after all tries; the next run repeats it."""


class Declined(Exception):
    """An answer that is none, for this one request: the server refused it, or the reply was cut at its token limit."""

    def __init__(self, kind: Literal["refused", "cut"], detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class RateLimit:
    """Requests and tokens per minute, shared by all threads; also the pauses a server asks for.

    Requests are spread evenly. Tokens are known afterwards, so a long answer delays the requests behind it.

    Args:
        requests_per_minute, tokens_per_minute: None is no limit.
        clock: seconds.
        sleep: waits; by default until `cancel()`.

    Raises:
        ValueError: for limits that are not positive.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        for name, value in {"requests": requests_per_minute, "tokens": tokens_per_minute}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{value} {name} per minute: the limit must be positive.")
        self.seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.clock = clock
        self._canceled = threading.Event()
        self.sleep = sleep or self._canceled.wait
        self._lock = threading.Lock()
        self._next = self._tokens = self._paused = float("-inf")

    def take(self) -> None:
        """Wait for this request's turn.

        Raises:
            Unanswered: when the run is being stopped.
        """
        while True:
            with self._lock:
                now = self.clock()
                start = max(now, self._next, self._tokens, self._paused)
                if start <= now:
                    self._next = now + self.seconds_per_request
                    return
            self.sleep(start - now)
            if self._canceled.is_set():
                raise Unanswered("the run is being stopped")

    def spend(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        if self.seconds_per_token:
            with self._lock:
                self._tokens = max(self.clock(), self._tokens) + tokens * self.seconds_per_token

    def pause(self, seconds: float) -> None:
        """Let all requests wait: the server has had enough for now."""
        with self._lock:
            self._paused = max(self._paused, self.clock() + seconds)

    def cancel(self) -> None:
        """Wake what waits, so that a stopped run ends at once."""
        self._canceled.set()


@dataclass
class Endpoint:
    """A chat model behind `<base_url>/chat/completions`.

    Plain HTTP of the standard library: `huggingface_hub.InferenceClient` would send the user's Hub token to whatever
    server is named here when no key is set, and does not repeat failed requests.

    Args:
        base_url: up to and with `/v1`.
        model: name the server knows.
        api_key_env: name of the environment variable with the key; the key is never printed.
        max_tokens, temperature, seed: of the answer.
        timeout: seconds without an answer.
        tries: per request; the pause doubles from `pause` seconds. What the server asks for in Retry-After is waited by
            all requests and is no try, up to 15 minutes per request.
        rate: limits of requests and tokens per minute.
        extra: further fields of every request.
        keeps_cut: whether a reply that was cut at `max_tokens` is an answer.

    Raises:
        ValueError: for an address that is not http(s); on call when the key, the model or the address is wrong.
        Declined: on call, for a request the server refuses as such, and for a reply that was cut at `max_tokens`.
        Unanswered: on call, after the last try.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    timeout: float = 300.0
    tries: int = 6
    pause: float = 1.0
    rate: RateLimit = field(default_factory=RateLimit, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    keeps_cut: bool = False

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url {self.base_url!r} must start with http:// or https://, e.g. http://localhost:8000/v1."
            )

    def __call__(self, messages: Messages) -> str:
        """Text of the answer to a conversation in OpenAI's format."""
        return text_of_answer(self.reply(messages), self.keeps_cut)

    def reply(self, messages: Messages) -> dict[str, Any]:
        """The server's whole reply, which holds an answer. Raises as a call."""
        failed, asked_for = 0, 0.0
        while True:
            self.rate.take()
            try:
                return self._ask_once(messages)
            except urllib.error.HTTPError as error:
                body = error.read(2000).decode(errors="replace")
                reason = self._masked(f"HTTP {error.code} {' '.join(body.split())[:300]}")
                self._raise_lasting(error.code, body, reason)
                wait = seconds_asked(error.headers.get("Retry-After"))
            except (OSError, ValueError) as error:  # no connection, a broken one, an answer that is none
                reason, wait = self._masked(f"{type(error).__name__}: {error}"), None
            if wait is not None and asked_for + wait <= LONGEST_ASKED:
                asked_for += max(wait, 0.1)  # so that a server which says 0 for ever is left at last
                self.rate.pause(wait)
                continue
            failed += 1
            if failed >= self.tries:
                raise Unanswered(f"{self.base_url} gave no answer in {failed} tries; the last: {reason}")
            self.rate.sleep(min(LONGEST_WAIT, self.pause * 2 ** (failed - 1)))

    def cancel(self) -> None:
        """Wake what waits; the run is being stopped."""
        self.rate.cancel()

    def body(self, messages: Messages) -> dict[str, Any]:
        """What is sent, as `/chat/completions` takes it."""
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            **self.extra,
        }

    def _ask_once(self, messages: Messages) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "fusedvlm"}
        if key := os.environ.get(self.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(self.body(messages)).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            content = response.read()
        answer = parse_answer(content)
        self.rate.spend(tokens_of(answer))
        text_of_answer(answer, self.keeps_cut)
        return answer

    def _raise_lasting(self, code: int, body: str, reason: str) -> None:
        """Raise for what another try would not change."""
        is_spent = code == 429 and "insufficient_quota" in body
        if code in CONFIGURATION or 300 <= code < 400 or is_spent:
            raise ValueError(
                f"{self.base_url} refused the request: {reason[:160]}. Check the address, the model name "
                f"{self.model!r} and the key in ${self.api_key_env}."
            ) from None
        if code < 500 and code not in PASSING:
            raise Declined("refused", reason) from None

    def _masked(self, text: str) -> str:
        """Servers may repeat the key in what they say about it."""
        key = os.environ.get(self.api_key_env)
        return text.replace(key, "***") if key else text


def seconds_asked(header: str | None) -> float | None:
    """What a Retry-After header asks for: seconds, or a date; None when it asks for nothing that can be read."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except (TypeError, ValueError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())


def parse_answer(content: bytes) -> dict[str, Any]:
    """A server's reply as JSON.

    Raises:
        ValueError: saying what it is instead.
    """
    if content.lstrip()[:1] == b"<":
        raise ValueError("a page of HTML in place of JSON: is the address the API's, up to and with /v1?")
    try:
        answer = json.loads(content)
    except ValueError:
        shown = content[:80].decode(errors="replace")
        raise ValueError(f"no JSON but {shown!r}") from None
    if not isinstance(answer, dict):
        raise ValueError(f"the answer is {type(answer).__name__}, not an object")
    return answer


def tokens_of(answer: dict[str, Any]) -> int:
    """Tokens that a reply says were used; 0 when it does not say."""
    usage = answer.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0


def text_of_answer(answer: dict[str, Any], keeps_cut: bool = False) -> str:
    """Text of a reply of `/chat/completions`; with `keeps_cut` also of one that was cut at its token limit.

    Raises:
        Declined: when it was refused by the model or a filter, or cut at its token limit.
        ValueError: when it is no such reply.
    """
    try:
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message["content"]
    except (KeyError, IndexError, TypeError, AttributeError):
        said = answer.get("error") or answer.get("detail")
        raise ValueError(
            f"the answer has no choices[0].message.content{f' but says {str(said)[:200]}' if said else ''}"
        ) from None
    if finish in CONTENT_STOPS or message.get("refusal"):
        raise Declined("refused", writable(str(message.get("refusal") or finish))[:300])
    if finish == "length" and not keeps_cut:
        raise Declined("cut", f"the reply was cut at its token limit after {len(text or '')} characters")
    if not isinstance(text, str):
        raise ValueError(f"the answer's content is {type(text).__name__}, not text")
    return writable(text)


def writable(text: str) -> str:
    """Text with U+FFFD for halves of characters, which broken JSON escapes leave and no file can hold.

    >>> writable("a \\ud83d b")
    'a \ufffd b'
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class LocalModel:
    """A chat model that transformers runs here.

    Args:
        model: folder or Hub id of a causal language model with a chat template.
        max_tokens, temperature, seed: of the answer.
        device: as in `transformers.pipeline`.

    Raises:
        ValueError: when the tokenizer has no chat template.
        Declined: on call, for a reply that was cut at `max_tokens`.
    """

    def __init__(
        self,
        model: str,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
        device: Any = None,
    ) -> None:
        from transformers import pipeline

        self.model = model
        self.seed = seed
        self.max_tokens = max_tokens
        generator: Any = pipeline("text-generation", model=model, device=device, dtype="auto")
        self.pipeline = generator
        if not self.pipeline.tokenizer.chat_template:
            raise ValueError(f"{model} has no chat template; use an instruction-tuned model.")
        self.options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        self.options["return_tensors"] = True
        if temperature > 0:
            self.options["temperature"] = temperature

    def __call__(self, messages: Messages) -> str:
        """Text of the answer; the same for the same conversation, in whatever order they come."""
        from transformers import set_seed

        set_seed(self.seed)
        tokenizer = self.pipeline.tokenizer
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = self.pipeline(messages, **self.options)[0]["generated_token_ids"][len(prompt["input_ids"]) :]
        if is_cut(list(ids), self.max_tokens, self.pipeline.model.generation_config.eos_token_id):
            raise Declined("cut", f"the reply was cut after {self.max_tokens} tokens")
        return tokenizer.decode(ids, skip_special_tokens=True)


def is_cut(ids: list[int], max_tokens: int, eos_token_id: int | list[int] | None) -> bool:
    """Whether generated tokens ended at their limit and not by themselves."""
    ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return len(ids) >= max_tokens and ids[-1] not in ends

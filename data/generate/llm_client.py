"""Ask a language model: any OpenAI-compatible endpoint, or transformers on this machine."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
Ask = Callable[[Messages], str]

PASSING = (408, 409, 425, 429)  # and everything from 500: worth another try
LONGEST_WAIT = 60.0  # seconds


class Unanswered(OSError):
    """A request that stayed without a usable answer after all tries."""


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
        tries: per request; the pause doubles from `pause` seconds, or is what the server's Retry-After says.

    Raises:
        ValueError: for an address that is not http(s); on call when the server refuses the request as such (wrong key,
            model or address).
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
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url {self.base_url!r} must start with http:// or https://, e.g. http://localhost:8000/v1."
            )

    def __call__(self, messages: Messages) -> str:
        """Text of the answer to a conversation in OpenAI's format."""
        for number in range(self.tries):
            try:
                return self._ask_once(messages)
            except urllib.error.HTTPError as error:
                reason, wait = self._refusal(error), error.headers.get("Retry-After", "")
                if error.code < 500 and error.code not in PASSING:
                    raise ValueError(
                        f"{self.base_url} refused the request: {reason}. Check the address, the model name "
                        f"{self.model!r} and the key in ${self.api_key_env}."
                    ) from None
            except (OSError, ValueError) as error:  # no connection, a broken one, an answer that is none
                reason, wait = self._masked(f"{type(error).__name__}: {error}"), ""
            if number + 1 < self.tries:
                asked = float(wait) if wait.replace(".", "", 1).isdigit() else 0.0
                self.sleep(min(LONGEST_WAIT, max(asked, self.pause * 2**number)))
        raise Unanswered(f"{self.base_url} gave no answer in {self.tries} tries; the last: {reason}")

    def _ask_once(self, messages: Messages) -> str:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        headers = {"Content-Type": "application/json", "User-Agent": "fusedvlm"}
        if key := os.environ.get(self.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError("the answer has no choices[0].message.content") from None
        if not isinstance(text, str):
            raise ValueError(f"the answer's content is {type(text).__name__}, not text")
        return text

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        return self._masked(f"HTTP {error.code} {' '.join(error.read(500).decode(errors='replace').split())}")

    def _masked(self, text: str) -> str:
        """Servers may repeat the key in what they say about it."""
        key = os.environ.get(self.api_key_env)
        return text.replace(key, "***") if key else text


class LocalModel:
    """A chat model that transformers runs here.

    Args:
        model: folder or Hub id of a causal language model with a chat template.
        max_tokens, temperature, seed: of the answer.
        device: as in `transformers.pipeline`.

    Raises:
        ValueError: when the tokenizer has no chat template.
    """

    def __init__(self, model: str, max_tokens: int = 1024, temperature: float = 0.0, seed: int = 0, device=None):
        from transformers import pipeline

        self.model = model
        self.seed = seed
        self.pipeline = pipeline("text-generation", model=model, device=device, dtype="auto")
        if not self.pipeline.tokenizer.chat_template:
            raise ValueError(f"{model} has no chat template; use an instruction-tuned model.")
        self.options = {"max_new_tokens": max_tokens, "do_sample": temperature > 0, "return_full_text": False}
        if temperature > 0:
            self.options["temperature"] = temperature

    def __call__(self, messages: Messages) -> str:
        """Text of the answer; the same for the same conversation, in whatever order they come."""
        from transformers import set_seed

        set_seed(self.seed)
        return self.pipeline(messages, **self.options)[0]["generated_text"]

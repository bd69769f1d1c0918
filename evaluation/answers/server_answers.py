"""An OpenAI-compatible server answers: ours, vLLM's, or anybody's; m travels with every request.

    {"chat_template_kwargs": {"processor_kwargs": {"num_visual_tokens": 8}}}

A server that does not know the field would answer at one m whatever is asked, and nobody would notice; so before
several m are asked, one question is asked at two of them: their prompts must differ by as many tokens.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from PIL import Image

from fusedvlm.console import say
from fusedvlm.data.generate.llm_client import Declined, Endpoint, Unanswered
from fusedvlm.evaluation.tasks.task import ImageData

from .variant_answers import Asked

PER_WORKER = 4  # questions that are handed over together for each request at a time
SHOWN = 5


class ServerAnswers:
    """Greedy answers of a server.

    Args:
        endpoint: the server and its model.
        concurrency: requests at a time.
        sends_m: whether requests name m; a server of another model knows none.
    """

    def __init__(self, endpoint: Endpoint, concurrency: int = 8, sends_m: bool = True) -> None:
        self.endpoint = replace(endpoint, keeps_cut=True, temperature=0.0)
        self.concurrency, self.sends_m = concurrency, sends_m
        self.batch_size = concurrency * PER_WORKER
        self.failed = 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides an answer beside model, prompt and m."""
        return {"decoding": "greedy", "server": True, "sends_m": self.sends_m}

    def answer(self, batch: Sequence[Asked], counts: Sequence[int]) -> list[dict[int, str]]:
        """Answers to each question at each m; what stayed without one is told and left out.

        Raises:
            ValueError: when the address, the model or the key is wrong, or no request of a whole batch is answered.
        """
        pairs = [(number, m) for number in range(len(batch)) for m in counts]
        answers: list[dict[int, str]] = [{} for _ in batch]
        with ThreadPoolExecutor(self.concurrency) as pool:
            texts = list(pool.map(lambda pair: self._ask(batch[pair[0]], pair[1]), pairs))
        for (number, m), text in zip(pairs, texts, strict=True):
            if isinstance(text, str):
                answers[number][m] = text
            else:
                self._tell(text)
        problems = [text for text in texts if not isinstance(text, str)]
        if len(problems) == len(pairs):
            raise ValueError(f"None of {len(pairs)} requests was answered; the last: {str(problems[-1])[:200]}")
        return answers

    def _ask(self, asked: Asked, m: int) -> str | Exception:
        try:
            return self._at(asked, m)(self.messages(asked)).strip()
        except (Declined, Unanswered) as error:
            return error

    def _at(self, asked: Asked, m: int) -> Endpoint:
        extra = {"chat_template_kwargs": {"processor_kwargs": {"num_visual_tokens": m}}} if self.sends_m else {}
        return replace(self.endpoint, max_tokens=asked.max_new_tokens, extra=extra)

    def _tell(self, error: Exception) -> None:
        self.failed += 1
        if self.failed <= SHOWN:
            say(f"No answer: {str(error)[:250]}")
        elif self.failed == SHOWN + 1:
            say("Further ones are counted and not shown.")

    def messages(self, asked: Asked) -> list[dict[str, Any]]:
        """A question in OpenAI's format.

        Raises:
            ValueError: for a bare question, which a chat has no place for.
        """
        if asked.question != asked.prompt:
            raise ValueError("A server's fusion module reads the chat; --bare-question needs the weights here.")
        shown = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in asked.images]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": asked.prompt}]}]

    def require_dial(self, asked: Asked, counts: Sequence[int]) -> None:
        """Raise `ValueError` when the server does not heed m: two prompts differ by something else than their m do."""
        one, other = min(counts), max(counts)
        if one == other or not self.sends_m or not asked.images:
            return
        short = replace(asked, max_new_tokens=1)
        lengths = [self._at(short, m).reply(self.messages(short)).get("usage") for m in (one, other)]
        tokens = [usage.get("prompt_tokens") if isinstance(usage, dict) else None for usage in lengths]
        if not (isinstance(tokens[0], int) and isinstance(tokens[1], int)):
            say("The server does not say how long prompts are, so nobody knows whether it heeds m.")
        elif tokens[1] - tokens[0] < other - one:
            raise ValueError(
                f"The server does not heed m: prompts at m={one} and m={other} have {tokens[0]} and {tokens[1]} "
                "tokens. Serve a FusedVLM with `fusedvlm serve`, or ask at one m alone."
            )


def data_uri(image: ImageData) -> str:
    """A picture's own bytes as an address."""
    data = image.read()
    kind = Image.MIME.get(Image.open(io.BytesIO(data)).format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

"""A stateless fusion service: prompts go as vectors to a server of the frozen language model, which knows no images.

One language model server (`vllm serve LLM --enable-prompt-embeds`) carries every variant on that LLM and every m. It
must stand on a private network: whoever reaches it can put any vectors into the model.
"""

import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import torch

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_encoder import embed_prompt

from .api_messages import ApiError, Sampling
from .engines import Piece
from .visual_encoder import VisualEncoder, VisualPrompt

CONNECT_SECONDS = 5.0


class EmbedsEngine:
    """Encoder here, language model there.

    Args:
        encoder: of a `FusedVLMEncoder` (or of a whole model).
        model: that model, for the language model's embedding rows.
        address: of the LLM's server, with or without `/v1`.
        api_key: of that server.
        timeout: seconds without any news from that server after which a request fails.
    """

    name = "embeds"

    def __init__(
        self, encoder: VisualEncoder, model: Any, address: str, api_key: str | None = None, timeout: float = 120.0
    ) -> None:
        self.encoder, self.model = encoder, model
        self.address = address.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.AsyncClient(
            base_url=self.address, headers=headers, timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip
        self.context = int(getattr(model.config.text_config, "max_position_embeddings", None) or 2**31)
        self.upstream: str | None = None
        settings = getattr(encoder, "generation_config", None) or model.generation_config
        eos = getattr(settings, "eos_token_id", None)
        eos = model.config.text_config.eos_token_id if eos is None else eos
        self.stop_token_ids = sorted(eos if isinstance(eos, list) else [eos] if eos is not None else [])

    async def start(self) -> None:
        """Ask the language model's server who it is; raises `ValueError` when it does not say."""
        try:
            await self._know_upstream()
        except ApiError as error:
            raise ValueError(str(error)) from None

    async def _know_upstream(self) -> str:
        if self.upstream is None:
            try:
                answer = await self.client.get("/v1/models")
                answer.raise_for_status()
                (model,) = answer.json()["data"][:1]
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                raise self._unreachable(error) from None
            self.context = min(self.context, int(model.get("max_model_len") or self.context))
            self.upstream = str(model["id"])
        return self.upstream

    def _unreachable(self, error: BaseException) -> ApiError:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        message = f"The language model's server at {self.address} does not answer ({reason})."
        return ApiError(502, message, "server_error", "language_model_unreachable")

    async def stop(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def request(self, prompt: VisualPrompt, sampling: Sampling, upstream: str) -> dict[str, Any]:
        """The completion request for a prompt; its vectors (L, H) travel in the encoder's dtype."""
        with torch.inference_mode():
            embeds = embed_prompt(self.model, prompt.input_ids, prompt.visual_tokens).cpu().clone()
        buffer = io.BytesIO()
        torch.save(embeds, buffer)
        request: dict[str, Any] = {
            "model": upstream,
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "stop_token_ids": self.stop_token_ids,
            # A placeholder would ask for a visual token that does not exist.
            "logit_bias": {str(self.model.config.image_token_id): -100},
        }
        if sampling.ignore_eos:
            request |= {"ignore_eos": True, "stop_token_ids": []}
        if sampling.top_k:
            request["top_k"] = sampling.top_k
        if sampling.seed is not None:
            request["seed"] = sampling.seed
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        return request

    async def answer(self, prompt: VisualPrompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """See `Engine.answer`; closing the iterator closes the connection, which ends the work there."""
        body = self.request(prompt, sampling, await self._know_upstream())
        ended = False
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise self._refusal(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                        continue
                    for piece in self._pieces(json.loads(line[5:])):
                        ended = ended or piece.finish_reason is not None
                        yield piece
        except (httpx.HTTPError, ValueError) as error:
            raise self._unreachable(error) from None
        if not ended:  # half an answer is none
            raise self._unreachable(ValueError("its stream ended before the answer did"))

    def _pieces(self, document: dict) -> list[Piece]:
        if "error" in document:
            error = document["error"]
            raise ValueError(str(error.get("message") if isinstance(error, dict) else error))
        found = []
        for choice in document.get("choices") or []:
            ids = tuple(choice.get("token_ids") or ())
            reason = choice.get("finish_reason")
            found.append(Piece(choice.get("text") or "", ids, reason and ("length" if reason == "length" else "stop")))
        return found

    def _refusal(self, status: int, body: bytes) -> ApiError:
        try:
            document = json.loads(body)
            error = document.get("error", document)
            message = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            message = body.decode(errors="replace")
        message = " ".join(message.split())[:200]
        if status == httpx.codes.TOO_MANY_REQUESTS:
            return ApiError(429, f"The language model's server is busy: {message}", "rate_limit_error")
        return ApiError(
            502, f"The language model's server refused ({status}): {message}", "server_error", "language_model_refused"
        )

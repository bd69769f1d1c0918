"""The OpenAI-compatible server: /v1/chat/completions, /v1/models, /health, /metrics."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fusedvlm.console import say

from .api_messages import ApiError, ChatRequest, Reply, Usage, read_request
from .engines import EncoderWorker, Engine, Piece, limit_tokens, plan_request, until_stop
from .image_source import ImageLimits
from .metrics import Metrics
from .visual_encoder import VisualPrompt

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class ServerSettings:
    """What a server takes and gives.

    Args:
        model_name: what clients call the model.
        api_key: what clients must show; none when everybody may ask.
        max_tokens: new tokens of an answer, at most, and where a request names none.
        max_queue: requests at once; further ones are told to come again.
        body_seconds: how long a request's body may take to arrive.
        images: limits on pictures.
    """

    model_name: str
    api_key: str | None = None
    max_tokens: int = 1024
    max_queue: int = 64
    body_seconds: float = 60.0
    images: ImageLimits = field(default_factory=ImageLimits)

    @property
    def max_body(self) -> int:
        """Bytes of a request: its pictures in base64 and some text."""
        return self.images.max_images * (self.images.max_bytes * 4 // 3 + 1024) + 2**20


class ChatServer:
    """Answers requests with an engine.

    Args:
        engine: `TransformersEngine` or `EmbedsEngine`.
        processor: of the variant.
        settings: see `ServerSettings`.
    """

    def __init__(self, engine: Engine, processor: Any, settings: ServerSettings) -> None:
        self.engine, self.processor, self.settings = engine, processor, settings
        self.metrics = Metrics(engine.encoder)
        self.worker = EncoderWorker(engine.encoder, self.metrics.batch.observe)
        self.running = 0
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
                Route("/v1/models", self._guarded(self.models), methods=["GET"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/metrics", self.show_metrics, methods=["GET"]),
            ],
            exception_handlers={404: _not_found, 405: _not_found},
        )

    async def start(self) -> None:
        """Start the engine; raises `ValueError` when it cannot."""
        await self.engine.start()

    async def stop(self) -> None:
        """End the engine and the encoder's thread."""
        await asyncio.to_thread(self.worker.stop)
        await self.engine.stop()

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except ApiError as error:
                headers = {"Retry-After": "1"} if error.status == 429 else None
                return JSONResponse(error.body(), error.status, headers)

        return guarded

    def _check_key(self, request: Request) -> None:
        key = self.settings.api_key
        given = request.headers.get("authorization", "").partition(" ")[2].strip()
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", "authentication_error", "invalid_api_key")

    # -- small pages ---------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 when requests are taken."""
        return JSONResponse({"status": "ok", "engine": self.engine.name, "running": self.running})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus' page."""
        return PlainTextResponse(self.metrics.text(), headers={"Content-Type": PROMETHEUS})

    async def models(self, request: Request) -> Response:
        """The one model, with what its dial can do."""
        config = self.engine.encoder.config
        model = {
            "id": self.settings.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "fusedvlm",
            "max_model_len": self.engine.context,
            "num_visual_tokens": config.num_visual_tokens,
            "num_followup_visual_tokens": config.num_followup_visual_tokens,
            "trained_num_visual_tokens": list(config.trained_num_visual_tokens),
            "max_num_visual_tokens": config.max_num_visual_tokens,
        }
        return JSONResponse({"object": "list", "data": [model]})

    # -- chat ----------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """One chat completion; counts what comes of it."""
        started = time.perf_counter()
        if self.running >= self.settings.max_queue:
            self.metrics.requests.labels(429).inc()
            raise ApiError(429, f"{self.running} requests are waiting already; try again later.", "rate_limit_error")
        self._enter()
        is_streaming = False
        try:
            status, response = 200, await self._answer(request, started)
            is_streaming = isinstance(response, StreamingResponse)
            return response
        except ApiError as error:
            status = error.status
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            status = 499
            raise
        except Exception as error:
            status = 500
            say(f"fusedvlm serve: {type(error).__name__}: {error}")
            raise ApiError(500, "The server failed to answer; its log says why.", "server_error") from error
        finally:
            if not is_streaming:
                self._leave(started)
            self.metrics.requests.labels(status).inc()

    def _enter(self) -> None:
        self.running += 1
        self.metrics.running.set(self.running)

    def _leave(self, started: float) -> None:
        self.running -= 1
        self.metrics.running.set(self.running)
        self.metrics.seconds.observe(time.perf_counter() - started)

    async def _answer(self, request: Request, started: float) -> Response:
        asked = read_request(await self._body(request), self.settings.images.max_images)
        if asked.model not in (None, self.settings.model_name):
            raise ApiError(
                404, f"There is no model {str(asked.model)[:80]!r} here, only {self.settings.model_name!r}.",
                code="model_not_found",
            )  # fmt: skip
        prompt = await _or_gone(request, self._encode(asked))
        self.metrics.encoding.observe(time.perf_counter() - started)
        limit_tokens(asked.sampling, prompt, self.engine.context, self.settings.max_tokens)
        visual = sum(len(tokens) for tokens in prompt.visual_tokens)
        reply = Reply(self.settings.model_name, Usage(len(prompt.input_ids), visual))
        pieces = until_stop(self.engine.answer(prompt, asked.sampling), asked.sampling.stop)
        if asked.stream:
            # The first piece is waited for, so that what the engine refuses is an error and no stream.
            first = await _or_gone(request, anext(pieces))
            self.metrics.first.observe(time.perf_counter() - started)
            return _EventStream(self._stream(reply, first, pieces, asked), lambda: self._end_stream(pieces, started))
        await _or_gone(request, self._collect(reply, pieces, started))
        self.metrics.add(reply.usage)
        return JSONResponse(reply.whole(asked.return_token_ids))

    async def _body(self, request: Request) -> bytes:
        most = self.settings.max_body
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise ApiError(413, f"The request has {int(length):,} bytes; at most {most:,} are taken.")

        async def read() -> bytes:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise ApiError(413, f"The request has more than {most:,} bytes.")
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.settings.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"The request was not there after {self.settings.body_seconds:g} seconds.", "timeout_error"
            ) from None

    async def _encode(self, asked: ChatRequest) -> VisualPrompt:
        plan, images = await asyncio.to_thread(
            plan_request, self.processor, self.engine.encoder, asked, self.settings.images
        )
        try:
            return await asyncio.wrap_future(self.worker.submit(plan, images))
        except ValueError as error:
            raise ApiError(400, " ".join(str(error).split())[:300]) from None

    async def _collect(self, reply: Reply, pieces: AsyncIterator[Piece], started: float) -> None:
        async for piece in pieces:
            if not reply.token_ids:
                self.metrics.first.observe(time.perf_counter() - started)
            _take(reply, piece)

    async def _end_stream(self, pieces: Any, started: float) -> None:
        with contextlib.suppress(RuntimeError):
            await pieces.aclose()
        self._leave(started)

    async def _stream(self, reply: Reply, first: Piece, pieces: Any, asked: ChatRequest) -> AsyncIterator[str]:
        try:
            yield _event(reply.chunk(is_first=True))
            piece: Piece | None = first
            while piece is not None:
                _take(reply, piece)
                if piece.text:
                    yield _event(reply.chunk(piece.text))
                piece = await anext(pieces, None)
            yield _event(reply.chunk(is_last=True))
            if asked.include_usage:
                yield _event(reply.usage_chunk())
            self.metrics.add(reply.usage)
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is sent already, the client gets to know in the stream
            say(f"fusedvlm serve: {type(error).__name__}: {error}")
            failure = error if isinstance(error, ApiError) else ApiError(500, "The server failed.", "server_error")
            yield _event(failure.body())


class _EventStream(StreamingResponse):
    """Server-sent events; `ended` is called however the stream ends, also when nobody reads its first."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], Awaitable[None]]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.ended()


def _take(reply: Reply, piece: Piece) -> None:
    reply.text += piece.text
    reply.token_ids += piece.token_ids
    reply.usage.completion = len(reply.token_ids)
    reply.usage.cached = max(reply.usage.cached, piece.cached)
    reply.finish_reason = piece.finish_reason or reply.finish_reason


def _event(document: dict) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _or_gone(request: Request, work: Any) -> Any:
    """The result of some work, which is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for part in (task, gone):
            part.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _not_found(request: Request, error: Exception) -> Response:
    message = f"There is no {request.method} {request.url.path[:80]} here; POST /v1/chat/completions answers."
    status = int(getattr(error, "status_code", 404))
    return JSONResponse(ApiError(status, message).body(), status)

"""Build and run the server of an engine in this process."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from transformers import AutoProcessor, GenerationConfig

from fusedvlm.console import say
from fusedvlm.costs.environment import choose_device
from fusedvlm.modeling_fusedvlm import FusedVLMEncoder
from fusedvlm.processing import FusedVLMProcessor

from .app import ChatServer, ServerSettings
from .byte_cache import ByteCache
from .chat import VisualChat, check_folder, know_trained_counts
from .embeds_engine import EmbedsEngine
from .engines import Engine, TransformersEngine
from .image_source import ImageLimits
from .visual_encoder import VisualEncoder

GRACE_SECONDS = 30


@dataclass(frozen=True)
class LocalOptions:
    """The options of `fusedvlm serve` for engines in this process; `llm_url` chooses `embeds`."""

    model: str
    revision: str | None = None
    device: str | None = None
    dtype: str = "auto"
    name: str = "fusedvlm"
    api_key: str | None = None
    llm_url: str | None = None
    llm_api_key: str | None = None
    max_tokens: int = 1024
    max_queue: int = 64
    max_images: int = 16
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 50_000_000
    image_urls: bool = True
    private_image_urls: bool = False
    cache_bytes: int = 2**30
    language_cache_bytes: int = 2**30
    round_down: bool = False  # serve the next smaller m that was trained, where the m asked for was not


def build_server(options: LocalOptions) -> ChatServer:
    """Load a variant and put a server in front of it.

    Raises:
        ValueError: when the variant cannot be loaded, or brings older code that cannot be served.
    """
    engine, processor = _embeds(options) if options.llm_url else _transformers(options)
    if options.round_down:
        processor.num_visual_tokens_policy = "round_down"
    images = ImageLimits(
        options.max_image_bytes, options.max_image_pixels, options.max_images, options.image_urls,
        options.private_image_urls,
    )  # fmt: skip
    settings = ServerSettings(options.name, options.api_key, options.max_tokens, options.max_queue, images=images)
    return ChatServer(engine, processor, settings)


def _transformers(options: LocalOptions) -> tuple[Engine, Any]:
    chat = VisualChat(
        options.model, options.revision, options.device, options.dtype, options.cache_bytes,
        options.language_cache_bytes,
    )  # fmt: skip
    if chat.answerer is None:
        raise ValueError(
            f"{options.model} brings older code of its own, which cannot be served; save it anew with this version: "
            "load it with the installed classes (trust_remote_code=False) and save_pretrained."
        )
    return TransformersEngine(chat.answerer), chat.processor


def _embeds(options: LocalOptions) -> tuple[Engine, Any]:
    check_folder(options.model)
    try:
        model = FusedVLMEncoder.from_pretrained(options.model, revision=options.revision, dtype=options.dtype)
        where: Any = {"revision": options.revision, "trust_remote_code": True}
        processor: Any = AutoProcessor.from_pretrained(options.model, **where)
    except Exception as error:
        # Readers of damaged JSON, safetensors and tokenizer files all raise types of their own.
        raise ValueError(f"{options.model} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not hasattr(processor, "plan_prompts"):
        processor = FusedVLMProcessor.from_pretrained(options.model, revision=options.revision or "main")
    know_trained_counts(processor, model.config)
    with contextlib.suppress(OSError):  # the LLM's own end-of-turn tokens, where the variant names them
        model.generation_config = GenerationConfig.from_pretrained(options.model, revision=options.revision or "main")
    model.to(choose_device(options.device)).eval()
    encoder = VisualEncoder(model, processor, ByteCache(options.cache_bytes))
    return EmbedsEngine(encoder, model, options.llm_url or "", options.llm_api_key), processor


class _Server(uvicorn.Server):
    """Ends after SIGTERM or SIGINT as soon as every answer is out, with exit code 0; a second signal does not wait."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if sys.platform == "win32":  # has no such handlers
            with super().capture_signals():
                yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        say("fusedvlm serve: stopping; answers that run are finished first.")


def run_server(server: ChatServer, host: str, port: int) -> None:
    """Serve until a signal.

    Raises:
        ValueError: when the address cannot be listened on, or the engine cannot start.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be listened on: {error.strerror or error}.") from None
    address = f"http://{host}:{listener.getsockname()[1]}"
    asyncio.run(_serve(server, listener, address))


async def _serve(server: ChatServer, listener: socket.socket, address: str) -> None:
    await server.start()
    config = uvicorn.Config(
        server.app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    say(f"fusedvlm serve: {server.settings.model_name} on {address}/v1 (engine {server.engine.name})")
    try:
        await _Server(config).serve([listener])
    finally:
        await server.stop()

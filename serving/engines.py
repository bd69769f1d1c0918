"""Engines behind the server: prompts with visual tokens in batches, answers piece by piece.

A request is prepared in a thread of its own (pictures fetched and decoded, text tokenized), its images and questions go
through the encoder together with those of other requests, and its answer comes from a language model: the one in this
process, or another server's (`embeds_engine.py`).
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.processing.processing_fusedvlm_plan import PromptPlan

from .answering import Answerer
from .api_messages import ApiError, ChatRequest, Sampling, wrong
from .byte_cache import KnownImage
from .image_source import ImageLimits, check_pixels, read_image
from .visual_encoder import VisualEncoder, VisualPrompt

MOST_TOGETHER = 32  # requests in one pass of the encoder


@dataclass
class Piece:
    """A part of an answer: text, its tokens, and at the end why it ended; `cached` as in `Usage`."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    cached: int = 0


class Engine(Protocol):
    """What the server asks of an engine."""

    name: str
    context: int
    encoder: VisualEncoder

    async def start(self) -> None:
        """Get ready; raises `ValueError` when that is not possible."""

    def answer(self, prompt: VisualPrompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """Pieces of the answer; closing the iterator ends the work."""

    async def stop(self) -> None:
        """End what runs."""


def plan_request(
    processor: Any, encoder: VisualEncoder, request: ChatRequest, limits: ImageLimits
) -> tuple[PromptPlan, list[KnownImage]]:
    """A request's tokens, segments and pictures, all of which can be read.

    Raises:
        ApiError: 400, with the message of whatever refused.
    """
    try:
        with encoder.text_lock:
            text = processor.apply_chat_template(request.conversation, tokenize=False, add_generation_prompt=True)
            (plan,) = processor.plan_prompts(
                text,
                num_visual_tokens=request.num_visual_tokens,
                num_followup_visual_tokens=request.num_followup_visual_tokens,
            )
        images = [read_image(address, limits) for address in request.images]
        return plan, [image if encoder.has_views(image) else _decoded(image, limits) for image in images]
    except (ValueError, OSError) as error:
        raise wrong(" ".join(str(error).split())[:300]) from None


def _decoded(image: KnownImage, limits: ImageLimits) -> KnownImage:
    check_pixels(image.source, limits)
    return KnownImage(image.key, load_image(image.source))


class EncoderWorker:
    """A thread that runs the encoder over all requests that wait, one batch after the other.

    Args:
        encoder: what runs.
        observe: told the number of requests of every batch.
    """

    def __init__(self, encoder: VisualEncoder, observe: Callable[[int], None] | None = None) -> None:
        self.encoder, self.observe = encoder, observe
        self._jobs: queue.Queue[tuple[PromptPlan, list[KnownImage], Future] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    def submit(self, plan: PromptPlan, images: list[KnownImage]) -> "Future[VisualPrompt]":
        """A prompt with its visual tokens, some time later."""
        future: Future[VisualPrompt] = Future()
        self._jobs.put((plan, images, future))
        return future

    def stop(self) -> None:
        """End after the batch that runs."""
        self._jobs.put(None)
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while True:
            jobs = [self._jobs.get()]
            while len(jobs) < MOST_TOGETHER and not self._jobs.empty():
                jobs.append(self._jobs.get())
            batch = [job for job in jobs if job is not None and job[2].set_running_or_notify_cancel()]
            if batch:
                self._encode(batch)
            if None in jobs:
                return

    def _encode(self, batch: list[tuple[PromptPlan, list[KnownImage], Future]]) -> None:
        if self.observe is not None:
            self.observe(len(batch))
        try:
            prompts = self.encoder.encode([plan for plan, _, _ in batch], [images for _, images, _ in batch])
        except Exception as error:  # noqa: BLE001 - goes to whom it concerns
            if len(batch) == 1:
                batch[0][2].set_exception(error)
                return
            for job in batch:  # one by one, so that nobody fails for another's sake
                self._encode([job])
            return
        for (_, _, future), prompt in zip(batch, prompts, strict=True):
            future.set_result(prompt)


class TransformersEngine:
    """The whole model in this process; one answer at a time, with everything cached that can be.

    Args:
        answerer: of the model.
    """

    name = "transformers"

    def __init__(self, answerer: Answerer) -> None:
        self.answerer, self.encoder = answerer, answerer.encoder
        self.processor = answerer.processor
        text = answerer.model.config.text_config
        self.context = int(getattr(text, "max_position_embeddings", None) or 2**31)
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="language-model", daemon=True)

    async def start(self) -> None:
        """Start the thread that answers."""
        self._thread.start()

    async def stop(self) -> None:
        """End after the answer that runs."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, 60)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    async def answer(self, prompt: VisualPrompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """See `Engine.answer`."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        closed = threading.Event()

        def tell(piece: Piece | BaseException) -> None:
            if not closed.is_set():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def job() -> None:
            if closed.is_set():
                return
            try:
                tell(self._generate(prompt, sampling, _Teller(self.processor.tokenizer, tell), closed))
            except Exception as error:  # noqa: BLE001 - raised again where the answer is read
                tell(error)

        self._jobs.put(job)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            closed.set()

    def _generate(
        self, prompt: VisualPrompt, sampling: Sampling, streamer: "_Teller", closed: threading.Event
    ) -> Piece:
        settings: dict[str, Any] = {"max_new_tokens": sampling.max_tokens, "do_sample": sampling.temperature > 0}
        if sampling.ignore_eos:
            settings["min_new_tokens"] = sampling.max_tokens
        if settings["do_sample"]:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        criteria = StoppingCriteriaList([_Closed(closed)])
        (answer,) = self.answerer.generate([prompt], streamer, stopping_criteria=criteria, **settings)
        eos = self.answerer.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        is_whole = not answer.token_ids or answer.token_ids[-1] in ends
        return Piece(finish_reason="stop" if is_whole else "length", cached=answer.reused_tokens)


class _Teller(TextStreamer):
    """Passes on text as it becomes whole words, with the tokens that made it."""

    def __init__(self, tokenizer: Any, tell: Callable[[Piece], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell, self.new = tell, []  # type: ignore[var-annotated]

    def put(self, value: torch.Tensor) -> None:
        if not (self.skip_prompt and self.next_tokens_are_prompt):
            self.new += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text or self.new:
            self.tell(Piece(text, tuple(self.new)))
            self.new = []


class _Closed(StoppingCriteria):
    """Ends generation when nobody reads any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


async def until_stop(pieces: AsyncIterator[Piece], stops: tuple[str, ...]) -> AsyncIterator[Piece]:
    """Pieces up to the first of some texts, which is left out; what may be the begin of one is held back."""
    held = ""
    async for piece in pieces:
        held += piece.text
        place = min((held.find(text) for text in stops if text in held), default=-1)
        if place >= 0:
            yield Piece(held[:place], piece.token_ids, "stop", piece.cached)
            return
        keep = 0 if piece.finish_reason else max((_overlap(held, text) for text in stops), default=0)
        free, held = held[: len(held) - keep], held[len(held) - keep :]
        yield Piece(free, piece.token_ids, piece.finish_reason, piece.cached)


def _overlap(text: str, stop: str) -> int:
    """How many of a text's last characters begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def limit_tokens(sampling: Sampling, prompt: VisualPrompt, context: int, most: int) -> None:
    """Fill in, or check, how many tokens an answer may have.

    Raises:
        ApiError: 400, when the prompt and the tokens asked for exceed the context.
    """
    left = context - len(prompt.input_ids)
    visual = sum(len(tokens) for tokens in prompt.visual_tokens)
    what = f"The prompt has {len(prompt.input_ids)} tokens, {visual} of them visual"
    if left < 1:
        raise wrong(f"{what}; the language model reads at most {context - 1} and needs one for the answer.")
    if sampling.max_tokens is not None and sampling.max_tokens > left:
        raise wrong(f"{what}, and max_tokens={sampling.max_tokens}; together at most {context}.")
    if sampling.max_tokens is not None and sampling.max_tokens > most:
        raise wrong(f"max_tokens={sampling.max_tokens}; this server gives at most {most}.")
    sampling.max_tokens = min(left, most) if sampling.max_tokens is None else sampling.max_tokens


__all__ = ["ApiError", "EncoderWorker", "Engine", "Piece", "TransformersEngine", "limit_tokens", "plan_request"]

"""Load a variant once and ask it questions about images: one by one, in a batch, in a conversation, streaming."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from fusedvlm.costs.environment import choose_device
from fusedvlm.model_source import require_source

from .answering import GIBIBYTE, Answerer
from .byte_cache import ByteCache

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
ONE_IMAGE = (str, Path, bytes, Image.Image, np.ndarray, torch.Tensor)


def check_folder(folder: str | Path) -> None:
    """Say in one line what a local model folder lacks, before anything is loaded.

    Raises:
        ValueError: naming the folder and the missing file, or a folder that does not exist.
    """
    if not isinstance(folder, str | Path):
        raise ValueError(f"A variant is named by its folder or repository, got {type(folder).__name__}.")
    require_source("model", folder)
    path = Path(folder)
    if not path.is_dir():
        return  # a Hub repository
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "query_tokenizer"):
        if not (path / name).exists():
            raise ValueError(f"{folder}: not a complete variant, {name} is missing.")
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise ValueError(f"{folder}: not a complete variant, it has no weights (model.safetensors).")


class VisualChat:
    """A variant and its processor, ready to answer.

    Args:
        model_name_or_path: variant folder or Hub repository.
        revision: commit, tag or branch of the repository.
        device: where to run; the first GPU, MPS or else the CPU by default.
        dtype: torch dtype or its name; the checkpoint's own by default.
        model_kwargs: further arguments of `from_pretrained`: `device_map`, `quantization_config`,
            `attn_implementation`, ...
        cache_bytes: bound on what is kept of pictures: view tokens, fusion states, visual tokens. A question about a
            picture that was asked about before costs its own tokens only. 0 keeps nothing.
        language_cache_bytes: bound on the language model's keys and values, from which the next turn of a conversation
            goes on. 0 keeps nothing.
        cache: a cache to share with other chats, instead of `cache_bytes`.

    Raises:
        ValueError: when a local folder is missing, incomplete or damaged, naming what is wrong.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        cache_bytes: int = GIBIBYTE,
        language_cache_bytes: int = GIBIBYTE,
        cache: ByteCache | None = None,
        **model_kwargs: Any,
    ) -> None:
        check_folder(model_name_or_path)
        is_placed = any(model_kwargs.get(name) is not None for name in ("device_map", "quantization_config"))
        if device is not None and is_placed:
            raise ValueError(f"device={device!r} and device_map or quantization_config both place the model; give one.")
        target = None if is_placed else choose_device(device)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(
                model_name_or_path, revision=revision, trust_remote_code=True, dtype=dtype, **model_kwargs
            )
            self.processor: Any = AutoProcessor.from_pretrained(
                model_name_or_path, revision=revision, trust_remote_code=True
            )
        except Exception as error:
            # Readers of damaged JSON, safetensors and tokenizer files all raise types of their own.
            raise ValueError(f"{model_name_or_path} cannot be loaded: {_first_line(error)}") from error
        know_trained_counts(self.processor, model.config)
        self.name, self.model = str(model_name_or_path), model
        if target is not None:
            self.model.to(target)
        self.model.eval()
        # CODEPATH: variants that bring older code of their own compute everything anew, as that code does.
        self.answerer: Answerer | None = None
        if hasattr(self.processor, "plan_prompts"):
            kept = ByteCache(cache_bytes) if cache is None else cache
            self.answerer = Answerer(self.model, self.processor, kept, language_cache_bytes)

    def __repr__(self) -> str:
        config = self.model.config
        m = f"m={config.num_visual_tokens} of 1..{config.max_num_visual_tokens}"
        return f"VisualChat({self.name!r}, {m}, {self.model.dtype}, {self.model.device})"

    def round_down(self) -> None:
        """Take the next smaller m that was trained where the m of a question was not.

        Raises:
            ValueError: when the variant brings older code of its own, which cannot.
        """
        if not hasattr(self.processor, "num_visual_tokens_policy"):
            raise ValueError("The code in this variant's folder cannot round m down; ask for an m that was trained.")
        self.processor.num_visual_tokens_policy = "round_down"

    def served(self, num_visual_tokens: int | str | None = None, question: str = "") -> int:
        """The m that a question gets: the one asked for, or a smaller one where the processor rounds down.

        Raises:
            ValueError: for "auto" without a calibration, or with older code in the variant's folder.
        """
        if num_visual_tokens == "auto":
            if not hasattr(self.processor, "choose_num_visual_tokens"):
                raise ValueError("The code in this variant's folder knows no num_visual_tokens='auto'; name m.")
            return self.processor.served_num_visual_tokens(num_visual_tokens, question)
        if hasattr(self.processor, "served_num_visual_tokens"):
            return self.processor.served_num_visual_tokens(num_visual_tokens)
        return int(num_visual_tokens or self.model.config.num_visual_tokens)

    def ask(
        self,
        images: Any,
        question: str,
        num_visual_tokens: int | str | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs: Any,
    ) -> str:
        """Answer one question about an image, or about several that are shown together.

        Args:
            images: one image (path, URL, PIL image, array) or a list of them.
            question: what is asked.
            num_visual_tokens: m; "auto" chooses it from the question, where the variant is calibrated; the variant's
                own by default.
            max_new_tokens: longest answer, in tokens.
            generate_kwargs: as in `generate`.
        """
        return self.ask_batch([images], [question], num_visual_tokens, max_new_tokens, **generate_kwargs)[0]

    def ask_batch(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        num_visual_tokens: int | str | Sequence[int | str] | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Answer question k about the image, or the images, of entry k, all in one batch.

        Raises:
            ValueError: when there are not as many entries as questions.
        """
        if isinstance(questions, str) or isinstance(images, ONE_IMAGE):
            raise ValueError("ask_batch takes a list of images and a list of questions; ask takes one of each.")
        if len(images) != len(questions):
            raise ValueError(
                f"{len(images)} entries of images and {len(questions)} questions: give one entry (an image, or a list "
                "of images shown together) for each question."
            )
        conversations = [[user_message(shown, text)] for shown, text in zip(images, questions, strict=True)]
        return self.reply_batch(conversations, num_visual_tokens, max_new_tokens, **generate_kwargs)

    @torch.inference_mode()
    def reply_batch(
        self,
        conversations: list[list[dict]],
        num_visual_tokens: int | str | Sequence[int | str] | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Next assistant message of each conversation."""
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, **generate_kwargs}
        if self.answerer is not None:
            answers = self.answerer.generate(self.answerer.prompts(conversations, num_visual_tokens), **settings)
            new: Any = [answer.token_ids for answer in answers]
        else:
            inputs = self.prepare(conversations, num_visual_tokens)
            new = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def stream(
        self,
        conversation: list[dict],
        num_visual_tokens: int | str | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs: Any,
    ) -> Iterator[str]:
        """Yield the next assistant message piece by piece. Errors of the generating thread are raised here.

        Closing the iterator, or leaving it, ends generation with the token that is being computed.
        """
        prompts: Any = None
        inputs: Any = None
        if self.answerer is not None:
            prompts = self.answerer.prompts([conversation], num_visual_tokens)
        else:
            inputs = self.prepare([conversation], num_visual_tokens)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[BaseException] = []
        closed = _Closed()
        criteria = StoppingCriteriaList([*(generate_kwargs.pop("stopping_criteria", None) or []), closed])

        def generate() -> None:
            try:
                settings = {"max_new_tokens": max_new_tokens, "do_sample": False, **generate_kwargs}
                with torch.inference_mode():
                    if self.answerer is not None:
                        self.answerer.generate(prompts, streamer, stopping_criteria=criteria, **settings)
                    else:
                        self.model.generate(**inputs, streamer=streamer, stopping_criteria=criteria, **settings)
            except Exception as error:  # noqa: BLE001 - carried over to the caller's thread below
                errors.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            closed.event.set()
            thread.join()
        if errors:
            raise errors[0]

    def prepare(
        self, conversations: list[list[dict]], num_visual_tokens: int | str | Sequence[int | str] | None = None
    ) -> BatchFeature:
        """Conversations to model inputs on the model's device."""
        kwargs: dict[str, Any] = {"padding": True, "padding_side": "left"}
        if isinstance(num_visual_tokens, (list, tuple)):
            kwargs["num_visual_tokens"] = list(num_visual_tokens)
        elif num_visual_tokens is not None:
            kwargs["num_visual_tokens"] = num_visual_tokens
        return self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs=kwargs,
        ).to(self.model.device)


def know_trained_counts(processor: Any, config: Any) -> None:
    """Tell a processor that was saved before it knew which m were trained, so that it can warn of the others."""
    if getattr(processor, "trained_num_visual_tokens", False) is None:  # a variant's own older code has no such field
        processor.trained_num_visual_tokens = list(config.trained_num_visual_tokens)
        processor.trained_num_visual_tokens_is_range = getattr(config, "trained_num_visual_tokens_is_range", None)


class _Closed(StoppingCriteria):
    """Ends generation when nobody reads any more."""

    def __init__(self) -> None:
        self.event = Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def user_message(images: Any, text: str) -> dict[str, Any]:
    """A user's message that shows an image, or several (none: an empty list), and asks something."""
    listed = [images] if isinstance(images, ONE_IMAGE) or hasattr(images, "read") else list(images)
    shown = [{"type": "image", "image": image} for image in listed]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]

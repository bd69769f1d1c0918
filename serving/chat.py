"""Load a variant once and ask it questions about images: one by one, in a batch, in a conversation, streaming."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

from fusedvlm.costs.environment import default_device

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def check_folder(folder: str) -> None:
    """Say in one line what a local model folder lacks, before anything is loaded.

    Raises:
        ValueError: naming the folder and the missing file.
    """
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

    Raises:
        ValueError: when a local folder is incomplete or damaged, naming what is wrong.
    """

    def __init__(
        self,
        model_name_or_path: str,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ):
        check_folder(model_name_or_path)
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(
                model_name_or_path, revision=revision, trust_remote_code=True, dtype=dtype
            )
            self.processor = AutoProcessor.from_pretrained(
                model_name_or_path, revision=revision, trust_remote_code=True
            )
        except Exception as error:
            # Readers of damaged JSON, safetensors and tokenizer files all raise types of their own.
            raise ValueError(f"{model_name_or_path} cannot be loaded: {_first_line(error)}") from error
        self.model.to(device or default_device()).eval()

    def ask(
        self,
        images: Sequence,
        question: str,
        num_visual_tokens: int | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs,
    ) -> str:
        """Answer one question about one or several images shown together."""
        return self.ask_batch([images], [question], num_visual_tokens, max_new_tokens, **generate_kwargs)[0]

    def ask_batch(
        self,
        images: Sequence[Sequence],
        questions: Sequence[str],
        num_visual_tokens: int | Sequence[int] | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs,
    ) -> list[str]:
        """Answer question k about the images of entry k, all in one batch."""
        conversations = [[user_message(shown, text)] for shown, text in zip(images, questions, strict=True)]
        return self.reply_batch(conversations, num_visual_tokens, max_new_tokens, **generate_kwargs)

    @torch.inference_mode()
    def reply_batch(
        self,
        conversations: list[list[dict]],
        num_visual_tokens: int | Sequence[int] | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs,
    ) -> list[str]:
        """Next assistant message of each conversation."""
        inputs = self.prepare(conversations, num_visual_tokens)
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **generate_kwargs})
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def stream(
        self,
        conversation: list[dict],
        num_visual_tokens: int | None = None,
        max_new_tokens: int = 128,
        **generate_kwargs,
    ) -> Iterator[str]:
        """Yield the next assistant message piece by piece. Errors of the generating thread are raised here."""
        inputs = self.prepare([conversation], num_visual_tokens)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        streamer=streamer,
                        max_new_tokens=max_new_tokens,
                        **{"do_sample": False, **generate_kwargs},
                    )
            except Exception as error:  # noqa: BLE001 - carried over to the caller's thread below
                errors.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if errors:
            raise errors[0]

    def prepare(self, conversations: list[list[dict]], num_visual_tokens=None):
        """Conversations to model inputs on the model's device."""
        kwargs = {"padding": True, "padding_side": "left"}
        if num_visual_tokens is not None:
            many = isinstance(num_visual_tokens, (list, tuple))
            kwargs["num_visual_tokens"] = list(num_visual_tokens) if many else num_visual_tokens
        return self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs=kwargs,
        ).to(self.model.device)


def user_message(images: Sequence, text: str) -> dict:
    """A user's message that shows images and asks something."""
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]

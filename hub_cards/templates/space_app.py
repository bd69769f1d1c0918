"""Ask a FusedVLM variant about an image, with as many visual tokens as you like.

Runs as a Gradio Space and on your machine: `pip install -r requirements.txt`, `python app.py`. Which model it asks is
in space.json: a repository with its revision, or a folder beside this file.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

HERE = Path(__file__).resolve().parent
SETTINGS = json.loads((HERE / "space.json").read_text(encoding="utf-8"))
LONGEST_QUESTION = 4000


def load() -> tuple[Any, Any]:
    """Model and processor, on the best device there is."""
    local = HERE / SETTINGS["model"]
    source = str(local) if local.is_dir() else SETTINGS["model"]
    options = {"trust_remote_code": True, "revision": None if local.is_dir() else SETTINGS["revision"]}
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model: Any = AutoModelForImageTextToText.from_pretrained(source, **options)
    return model.to(device).eval(), AutoProcessor.from_pretrained(source, **options)


model, processor = load()
LARGEST_M = model.config.max_num_visual_tokens
COUNTS = [m for m in model.config.connector_class.counts(model.config) if m <= LARGEST_M]


class Stream(TextIteratorStreamer):
    """Text as it is made, and how many tokens it took."""

    count = 0

    def put(self, value: Any) -> None:
        """Count what comes after the prompt."""
        if not self.next_tokens_are_prompt:
            self.count += value.numel()
        super().put(value)


def answer(image: Any, question: Any, num_visual_tokens: Any, max_new_tokens: Any) -> Iterator[tuple[str, str]]:
    """Yield (answer so far, note on tokens and time)."""
    if image is None:
        raise gr.Error("Choose an image first.")
    if not question.strip():
        raise gr.Error("Ask something about the image.")
    if len(question) > LONGEST_QUESTION:
        raise gr.Error(f"The question has {len(question)} characters; at most {LONGEST_QUESTION}.")
    started = time.perf_counter()
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": int(num_visual_tokens)},
    ).to(model.device)
    shown = int((inputs["input_ids"] == model.config.image_token_id).sum())
    streamer = Stream(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure = []

    def generate() -> None:
        try:
            model.generate(**inputs, streamer=streamer, max_new_tokens=int(max_new_tokens), do_sample=False)
        except Exception as error:  # noqa: BLE001 - raised again in the thread that shows it
            failure.append(error)
            streamer.end()

    worker = Thread(target=generate, daemon=True)
    worker.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text, note(shown, inputs["input_ids"].shape[1], streamer.count, started)
    worker.join()
    if failure:
        raise gr.Error(f"{type(failure[0]).__name__}: {str(failure[0]).splitlines()[0]}")
    yield text, note(shown, inputs["input_ids"].shape[1], streamer.count, started)


def note(shown: Any, prompt: Any, new: Any, started: Any) -> str:
    """One line on what the answer cost."""
    seconds = time.perf_counter() - started
    return f"{shown} visual tokens, {prompt} prompt tokens in all, {new} new tokens, {seconds:.2f} s"


with gr.Blocks(title=SETTINGS["title"]) as demo:
    gr.Markdown(f"# {SETTINGS['title']}\n\nThe slider is m: how many tokens the language model sees of the image.")
    with gr.Row():
        with gr.Column():
            picture = gr.Image(type="pil", label="Image")
            words = gr.Textbox(label="Question", value=SETTINGS["question"], lines=2)
            if list(range(COUNTS[0], LARGEST_M + 1)) == COUNTS and len(COUNTS) > 1:
                dial = gr.Slider(
                    COUNTS[0], LARGEST_M, value=model.config.num_visual_tokens, step=1, label="Visual tokens m",
                    interactive=True,
                )  # fmt: skip
            else:
                dial = gr.Dropdown(COUNTS, value=model.config.num_visual_tokens, label="Visual tokens m")
            longest = gr.Slider(1, 512, value=64, step=1, label="Longest answer, tokens")
            button = gr.Button("Ask", variant="primary")
        with gr.Column():
            reply = gr.Textbox(label="Answer", lines=8)
            cost = gr.Textbox(label="Cost", lines=1)
    gr.on(
        [button.click, words.submit],
        answer,
        inputs=[picture, words, dial, longest],
        outputs=[reply, cost],
        api_name="answer",
        concurrency_limit=1,
    )

if __name__ == "__main__":
    demo.queue().launch(server_port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))

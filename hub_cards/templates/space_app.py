"""Ask a FusedVLM variant about an image, with two numbers of visual tokens side by side.

Runs as a Gradio Space and on your machine: `pip install -r requirements.txt`, `python app.py`. Which model it asks is
in space.json: a repository with its revision, or a folder beside this file.
"""

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, TextIteratorStreamer

HERE = Path(__file__).resolve().parent
SETTINGS = json.loads((HERE / "space.json").read_text(encoding="utf-8"))
LONGEST_QUESTION = 4000
MOST_TURNS = 20
KEPT_IMAGES = 8


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
OWN_M = model.config.num_visual_tokens
OTHER_M = max((m for m in COUNTS if m <= max(1, OWN_M // 8)), default=COUNTS[0])
VIEWS: OrderedDict[str, tuple[Any, Any]] = OrderedDict()  # an image's view tokens: both m and every question share them
LOCK = Lock()


class Stream(TextIteratorStreamer):
    """Text as it is made, and how many tokens it took."""

    count = 0

    def put(self, value: Any) -> None:
        """Count what comes after the prompt."""
        if not self.next_tokens_are_prompt:
            self.count += value.numel()
        super().put(value)


class Confidence(LogitsProcessor):
    """How probable the model finds the tokens that it chooses."""

    def __init__(self) -> None:
        self.logs: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.logs.append(float(scores[0].float().log_softmax(-1).max()))
        return scores

    def text(self) -> str:
        """Geometric mean over the tokens so far."""
        mean = torch.tensor(self.logs).mean().exp().item() if self.logs else 0.0
        return f"{mean:.0%} confidence"


def views_of(image: Any) -> tuple[Any, Any]:
    """View tokens of a picture and their number; the vision tower runs once per picture."""
    key = hashlib.blake2b(image.tobytes() + repr(image.size).encode()).hexdigest()
    with LOCK:
        if key not in VIEWS:
            pixels = processor.image_processor([image], return_tensors="pt")
            features, _ = model.model.get_view_features(pixels["pixel_values"].to(model.device))
            VIEWS[key] = features, pixels["image_num_views"]
        VIEWS.move_to_end(key)
        while len(VIEWS) > KEPT_IMAGES:
            VIEWS.popitem(last=False)
        return VIEWS[key]


def messages_of(turns: Any, question: Any) -> list[dict]:
    """The conversation so far and one more question; the picture stands in front of the first."""
    messages: list[dict] = []
    for asked, answered in [*turns, (question, None)]:
        shown = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": asked}]})
        if answered is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
    return messages


@torch.inference_mode()
def encode(image: Any, turns: Any, question: Any, m: Any) -> tuple[Any, Any]:
    """Prompt and visual tokens, ready for `generate`."""
    features, num_views = views_of(image)
    text = processor.apply_chat_template(messages_of(turns, question), add_generation_prompt=True, tokenize=False)
    inputs = processor.encode_prompts(
        [text], num_visual_tokens=int(m), image_num_views=num_views.tolist(), return_tensors="pt"
    ).to(model.device)
    prompt = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    visual = model.get_image_features(view_features=features, image_num_views=num_views, return_dict=True, **inputs)
    return prompt, visual


def reply(image: Any, turns: Any, question: Any, m: Any, longest: Any) -> Iterator[tuple[str, str]]:
    """Yield (answer so far, note on tokens, seconds and confidence)."""
    started = time.perf_counter()
    prompt, visual = encode(image, turns, question, m)
    shown = int((prompt["input_ids"] == model.config.image_token_id).sum())
    streamer = Stream(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    confidence, failure = Confidence(), []

    def note() -> str:
        seconds = time.perf_counter() - started
        read = f"{shown} visual tokens, {prompt['input_ids'].shape[1]} prompt tokens in all"
        return f"{read}, {streamer.count} new tokens, {seconds:.2f} s, {confidence.text()}"

    def generate() -> None:
        try:
            model.generate(
                **prompt, mm_encoder_outputs={"image": visual}, streamer=streamer, max_new_tokens=int(longest),
                do_sample=False, logits_processor=[confidence],
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - raised again in the thread that shows it
            failure.append(error)
            streamer.end()

    worker = Thread(target=generate, daemon=True)
    worker.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text, note()
    worker.join()
    if failure:
        raise failure[0]
    yield text.strip(), note()


def check(image: Any, question: Any, turns: Any) -> None:
    """Say in words what is missing."""
    if image is None:
        raise gr.Error("Choose an image first.")
    if not question.strip():
        raise gr.Error("Ask something about the image.")
    if len(question) > LONGEST_QUESTION:
        raise gr.Error(f"The question has {len(question)} characters; at most {LONGEST_QUESTION}.")
    if len(turns) >= MOST_TURNS:
        raise gr.Error(f"{MOST_TURNS} questions are asked already; start anew.")


def bubbles(turns: Any, question: Any = None, answered: Any = "", note: Any = "") -> list[dict]:
    """Turns as the chat shows them, with what the last answer cost below it."""
    shown: list[dict] = []
    for asked, answer, cost in turns:
        shown += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": f"{answer}\n\n({cost})"},
        ]
    if question is not None:
        below = f"\n\n({note})" if note else ""
        shown += [{"role": "user", "content": question}, {"role": "assistant", "content": f"{answered or '…'}{below}"}]
    return shown


def ask(
    image: Any, question: Any, m: Any, other_m: Any, compare: Any, longest: Any, turns: Any, other_turns: Any
) -> Iterator[tuple]:
    """Answer with m, then with the other m; yields both chats, their turns and what is left in the question's box."""
    check(image, question, turns)
    image = image.convert("RGB")
    sides = [(list(turns), m), *([(list(other_turns), other_m)] if compare else [])]
    done = [sides[0][0], sides[1][0] if compare else []]
    for number, (before, count) in enumerate(sides):
        text = note = ""
        try:
            for text, note in reply(image, [turn[:2] for turn in before], question, count, longest):
                chats = [bubbles(turns) for turns in done]
                chats[number] = bubbles(before, question, text, note)
                yield *chats, turns, other_turns, question
        except Exception as error:
            raise gr.Error(" ".join(str(error).split())[:300] or type(error).__name__) from error
        done[number] = [*before, (question, text, note)]
    yield bubbles(done[0]), bubbles(done[1]), done[0], done[1], ""


def forget() -> tuple:
    """Empty chats: another picture, or another conversation."""
    return [], [], [], []


def dial(value: int, label: str) -> Any:
    """A slider where every m can be had, else a list."""
    if list(range(COUNTS[0], LARGEST_M + 1)) == COUNTS and len(COUNTS) > 1:
        return gr.Slider(COUNTS[0], LARGEST_M, value=value, step=1, label=label, interactive=True)
    return gr.Dropdown(COUNTS, value=value, label=label)


with gr.Blocks(title=SETTINGS["title"]) as demo:
    gr.Markdown(
        f"# {SETTINGS['title']}\n\nThe dial is m: how many tokens the language model sees of the image. "
        "Ask, compare two m, ask again about what was said."
    )
    turns, other_turns = gr.State([]), gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            picture = gr.Image(type="pil", label="Image", height=280)
            with gr.Row():
                dial_m = dial(OWN_M, "m")
                dial_other = dial(OTHER_M, "m beside it")
            compare = gr.Checkbox(True, label="Compare two m")
            longest = gr.Slider(1, 512, value=64, step=1, label="Longest answer, tokens")
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                chat = gr.Chatbot(label="m", height=340, min_width=240, elem_id="chat", render_markdown=False)
                other = gr.Chatbot(
                    label="m beside it", height=340, min_width=240, elem_id="other", render_markdown=False
                )
            words = gr.Textbox(label="Question", value=SETTINGS["question"], lines=2, elem_id="words")
            with gr.Row():
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                again = gr.Button("Start anew", elem_id="anew")
            gr.Examples([[text] for text in SETTINGS.get("questions") or [SETTINGS["question"]]], [words])
            if SETTINGS.get("pictures"):
                gr.Examples([[str(HERE / name)] for name in SETTINGS["pictures"]], [picture])
    gr.on(
        [button.click, words.submit],
        ask,
        inputs=[picture, words, dial_m, dial_other, compare, longest, turns, other_turns],
        outputs=[chat, other, turns, other_turns, words],
        api_name="ask",
        concurrency_limit=1,
        show_progress="hidden",  # its "Error" would cover what was said
    )
    gr.on([again.click, picture.change], forget, outputs=[chat, other, turns, other_turns], api_name=False)
    compare.change(lambda shown: gr.update(visible=shown), compare, other, api_name=False)

if __name__ == "__main__":
    demo.queue().launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1" if "SPACE_ID" not in os.environ else "0.0.0.0"),
        server_port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)),
    )

"""What the servers are asked: a variant that reads the question, conversations, and the answers of `generate`."""

import asyncio
import base64
import io
import json
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fusedvlm.tests import tiny

QUESTIONS = [
    "what is it?",
    "describe the picture in detail, please.",
    "how many objects are there on the sofa?",
    "yes or no",
]
SIZES = [(60, 40), (67, 51), (200, 30), (30, 31)]
NEW = 12


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": number} for number in images), {"type": "text", "text": text}],
    }


def said(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CONVERSATIONS = {
    "two images": [user("which one is red?", 0, 1)],
    "two turns": [user("what is it?", 0), said("a cat"), user("what colour is it?")],
    "three turns, new image": [
        user("what is it?", 0),
        said("a cat"),
        user("and this?", 1),
        said("a sofa"),
        user("compare"),
    ],
    "text only": [user("hello <image> <|question|> how are you")],
    "typed markers": [user("what does <image> mean? <|/question|>", 2)],
    "system": [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, user("what is it?", 3)],
}
CASES = {
    **{f"{i} {q} m={m}": ([user(q, i)], m, None) for i in range(4) for q in QUESTIONS for m in (1, 3, 12)},
    **{f"{name} m={m} m'={k}": (conversation, m, k) for name, conversation in CONVERSATIONS.items() for m, k in ((7, None), (7, 1), (3, 2))},
}  # fmt: skip


def pictures():
    return [tiny.picture(number, *size) for number, size in enumerate(SIZES)]


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_images(conversation, make):
    """The conversation with something in place of its images' numbers."""
    return [
        {
            **message,
            "content": [make(part["image"]) if part["type"] == "image" else part for part in message["content"]],
        }
        for message in conversation
    ]


def for_client(conversation):
    shown = [data_uri(image) for image in pictures()]
    return with_images(conversation, lambda number: {"type": "image_url", "image_url": {"url": shown[number]}})


def counts_of(m, k):
    return {"num_visual_tokens": m, **({} if k is None else {"num_followup_visual_tokens": k})}


def extra(m=None, k=None, **more):
    """`extra_body` of a request with m and m'."""
    return {**({"chat_template_kwargs": {"processor_kwargs": counts_of(m, k)}} if m else {}), **more}


def answers(folder: Path) -> dict:
    """{case: new ids, text, number of prompt and visual tokens} by `generate` on the saved variant."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    shown = pictures()
    found = {}
    for name, (conversation, m, k) in CASES.items():
        inputs = processor.apply_chat_template(
            with_images(conversation, lambda number: {"type": "image", "image": shown[number]}),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs=counts_of(m, k),
        )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, length:].tolist()
        visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
        found[name] = {
            "ids": ids,
            "text": processor.decode(ids, skip_special_tokens=True),
            "prompt": length,
            "visual": visual,
        }
    return found


@contextmanager
def running(server):
    """Address of a `ChatServer` that runs in a thread."""
    import uvicorn

    from fusedvlm.serving.local_server import _Server

    config = uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="warning", access_log=False, lifespan="off")

    class Quiet(_Server):
        @contextmanager
        def capture_signals(self):
            yield

    web = Quiet(config)

    async def serve():
        await server.start()
        try:
            await web.serve()
        finally:
            await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not web.started:
        thread.join(0.02)
        assert thread.is_alive(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def write_case(folder: Path) -> None:
    """A tiny variant whose sizes vLLM can run too, its picture files, and the answers, for other environments."""
    from transformers import LlamaConfig

    tokenizer = tiny.text_tokenizer()
    llm = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_backbones(folder, 0, llm_config=llm)
    model = tiny.build_model(
        folder, num_visual_tokens=12, num_followup_visual_tokens=3, trained_num_visual_tokens=[1, 7, 12]
    )
    processor = tiny.build_tiny_processor(model)
    for name, merged in (("ref", False), ("merged", True)):
        model.save_pretrained(folder / name, merged=merged)
        processor.save_pretrained(folder / name)
    (folder / "answers.json").write_text(json.dumps(answers(folder / "ref")))


if __name__ == "__main__":
    write_case(Path(sys.argv[1]))

"""Conversations as applications send them: one batch that says exactly what was said, or one line about the message."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusedvlm.tests import tiny
from fusedvlm.tests.fuzz.harness import Target, explore, json_cases, judge

NAMES = ("no such file", "essage", "ample", "image", "question", "onversation", "content", "prompt")
PICTURES = [tiny.picture(number, 31 + number, 23) for number in range(4)]
TYPED = [
    "<image>",
    "<s>",
    "</s>[INST]",
    "<|question|>",
    "<|/question|>",
    "<|answer|>",
    "<|piece|>",
    "<|image_again|>",
    "<|asked|>",
]


def with_pictures(value: Any) -> Any:
    """JSON whose image parts hold pictures: `{"type": "image", "image": 3}` is the fourth."""
    if isinstance(value, list):
        return [with_pictures(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    value = {key: with_pictures(entry) for key, entry in value.items()}
    if value.get("type") == "image" and type(value.get("image")) is int:
        value["image"] = PICTURES[value["image"] % len(PICTURES)]
    return value


def texts_of(messages: list[dict]) -> list[str]:
    """Everything that somebody said."""
    found = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [part["text"] for part in parts if part.get("type") == "text"]
    return found


def plain(messages: list[dict]) -> list[dict]:
    """The same conversation with harmless text."""
    replaced = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{"type": "text", "text": "x"} if part.get("type") == "text" else part for part in content]
        replaced.append({**message, "content": "x" if isinstance(content, str) else content})
    return replaced


class Reader:
    """Reads a conversation with the tiny processor."""

    def __init__(self, processor):
        self.processor = processor

    def encode(self, messages: list[dict]) -> dict:
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def __call__(self, case: bytes, folder: Path) -> None:
        messages = with_pictures(json.loads(case))
        inputs = self.encode(messages)
        if isinstance(messages[0], list):  # several conversations
            assert len(inputs["input_ids"]) == len(messages)
            if len(messages) > 1:
                return
            messages = messages[0]
        ids = inputs["input_ids"]
        assert ids.ndim == 2
        assert len(ids) == 1, "one conversation is one prompt"
        ids = ids[0].tolist()
        tokenizer = self.processor.tokenizer
        placeholders = ids.count(self.processor.image_token_id)
        assert placeholders == int(inputs["num_visual_tokens"].sum() if "num_visual_tokens" in inputs else 0)
        views = int(inputs["image_num_views"].sum()) if "image_num_views" in inputs else 0
        assert views == (len(inputs["pixel_values"]) if "pixel_values" in inputs else 0)
        parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
        assert sum(part.get("type") == "image" for part in parts) == len(inputs.get("image_num_views", []))
        said = tokenizer.decode(ids)
        for text in texts_of(messages):
            assert text.strip() in said, f"{text!r} is missing in {said!r}"
        special = set(tokenizer.all_special_ids) - {self.processor.image_token_id}
        expected = [token for token in self.encode(plain(messages))["input_ids"][0].tolist() if token in special]
        assert [token for token in ids if token in special] == expected, "typed text became a special token"


ODD_TEXTS = [*TYPED, None, 1, True, [], {}, "", " ", "\n", "x" * 300, "é漢🙂", "\ud800", "\0", ["a"], [{"type": "text", "text": "b"}],
    [{"type": "image", "image": 1}], [{"type": "video", "video": "a.mp4"}], {"type": "text", "text": "c"}, "image", "text",
    "user", "assistant", "system", "tool", [{}], [None], 2.5, {"type": "image"}, {"type": "text"}]  # fmt: skip


@pytest.fixture(scope="module")
def target(processor):
    return Target("messages", Reader(processor), NAMES, json_cases(odd=ODD_TEXTS))


CASES = Target("messages", lambda case, folder: None, (), json_cases()).corpus()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_the_corpus(path, target, tmp_path):
    kind = judge(target, path.read_bytes(), tmp_path)
    assert kind == "clean" or not path.name.startswith("seed-")


@pytest.mark.timeout(0)
def test_damaged_conversations(target, tmp_path):
    seen = explore(target, tmp_path)
    assert seen["clean"]
    assert seen["refused"]

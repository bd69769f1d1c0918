"""Conversations that a template would half read are refused in one line that names the message."""

import io

import numpy as np
import pytest
import torch

from fusedvlm.tests import tiny

PICTURE = {"type": "image", "image": tiny.picture(0)}
ASK = {"type": "text", "text": "what?"}


def encode(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "A conversation is a list of messages, one at least"),
        (None, "list of messages.*None"),
        ("what?", "list of messages.*'what"),
        ([[]], "Conversation 0 is a list of messages, one at least"),
        ([{"role": "user"}], r"Message 0 \(user\): content must be text or a list of parts, got None"),
        ([{"role": "user", "content": None}], "content must be text"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], r"Message 0 \(user\): content"),
        ([{"role": "user", "content": ["what?"]}], r"part 0 is of 'what\?', which is no part"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "part 0: text must be text, got None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text must be text, got None"),
        ([{"role": "user", "content": [ASK, {"type": "video", "video": "a.mp4"}]}], "part 1 is of type 'video'"),
        ([{"role": "user", "content": [{"text": "a"}]}], "part 0 is of type None"),
        ([{"role": "user", "content": [{"type": "image", "image": {"path": "a.png"}}]}], "image must be a picture"),
        ([{"role": "user", "content": [{**PICTURE, "path": "a.png"}, ASK]}], "they would be 2 images"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url needs a url"),
        ([{"role": "bot", "content": "a"}], "Message 0 has role 'bot'; use one of system, user, assistant"),
        ([{"role": 1, "content": "a"}], "Message 0 has role 1"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "Message 1 is from the system; only"),
        ([{"role": "user", "content": "half \ud800"}], "Message 0: character 5 of the text is half of a pair"),
        ([[{"role": "user", "content": "a"}], [{"role": "user", "content": 3}]], "Conversation 1, message 0"),
        ([{"role": "user", "content": "a"}, "b"], "Message 1 must be a mapping"),
        ([{"role": "system", "content": "a"}], "Message 0 is from the system and stands in the first question"),
        ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "no user asks one"),
        (
            [{"role": "system", "content": [PICTURE, ASK]}, {"role": "user", "content": "a"}],
            r"0 \(system\), part 0 is an",
        ),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [PICTURE]}], "belong to the user's"),
    ],
)
def test_what_cannot_be_read_is_named(processor, messages, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(processor, messages)
    assert len(str(error.value)) <= 300
    assert "\n" not in str(error.value)


def test_a_long_value_stays_a_short_line(processor):
    with pytest.raises(ValueError, match=r"\.\.\. \(list\)") as error:
        encode(processor, [{"role": "user", "content": [{"type": "text", "text": ["x" * 5000]}]}])
    assert len(str(error.value)) <= 300


def test_broken_text_is_refused_without_a_template_too(processor):
    with pytest.raises(ValueError, match="Sample 1: character 2 of the text"):
        processor(text=["a", "b \udfff"])


@pytest.mark.parametrize("kind", [tuple, list])
def test_what_can_be_read_still_is(processor, kind):
    """Tuples, arrays, empty answers of a tool's kind, parts without a source: as before."""
    array = np.asarray(tiny.picture(0))
    messages = kind([{"role": "user", "content": kind([{"type": "image", "image": array}, ASK])}])
    expected = encode(processor, [{"role": "user", "content": [PICTURE, ASK]}])
    assert encode(processor, messages)["input_ids"].tolist() == expected["input_ids"].tolist()
    assert "<image>" in processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, ASK]}])


def test_a_message_may_hold_whatever_the_image_processor_reads(processor, tmp_path):
    """Open files, bytes of any kind, rows of `datasets` and arrays of other libraries."""
    path = tmp_path / "a.png"
    tiny.picture(0).save(path)
    data = path.read_bytes()
    foreign = type("Foreign", (), {"__array__": lambda self, dtype=None, copy=None: np.asarray(tiny.picture(0))})()
    expected = encode(processor, [{"role": "user", "content": [{"type": "image", "image": str(path)}, ASK]}])
    rows = {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}
    for source in (io.BytesIO(data), memoryview(data), bytearray(data), *rows, foreign):
        found = encode(processor, [{"role": "user", "content": [{"type": "image", "image": source}, ASK]}])
        assert torch.equal(found["pixel_values"], expected["pixel_values"]), type(source)
    with pytest.raises(ValueError, match="open it in binary mode"):
        encode(processor, [{"role": "user", "content": [{"type": "image", "image": io.StringIO("x")}, ASK]}])


def test_an_llms_own_template_may_know_more_roles(processor):
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "system", "content": "c"}]
    assert processor.apply_chat_template(messages, chat_template=template) == "user: a\ntool: b\nsystem: c\n"


def test_a_template_that_refuses_says_so_in_one_line(processor):
    template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(ValueError, match="chat template refuses the conversation: roles must alternate"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template)

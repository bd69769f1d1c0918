"""The server against an unmodified OpenAI client: the answers are those of `generate`."""

import contextlib
import dataclasses
import gc
import json
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fusedvlm import serving
from fusedvlm.serving import user_message
from fusedvlm.serving.byte_cache import size_of
from fusedvlm.tests import tiny
from fusedvlm.tests.serving.api_cases import CASES, NEW, QUESTIONS, extra, for_client, running, said, user, write_case

for name in ("starlette", "uvicorn", "httpx", "prometheus_client"):
    pytest.importorskip(name, reason="serving is not installed (pip install 'fusedvlm[serve]')")
openai = pytest.importorskip("openai", reason="the client is not installed (pip install 'fusedvlm[test]')")
KEY = "sk-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    write_case(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "answers.json").read_text())


@pytest.fixture(scope="module")
def server(folder):
    return serving.build_server(
        serving.LocalOptions(str(folder / "ref"), device="cpu", name="tiny", api_key=KEY, max_tokens=64)
    )


@pytest.fixture(scope="module")
def address(server):
    with running(server) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def ask(client, conversation, m=None, k=None, **kwargs):
    return client.chat.completions.create(
        model="tiny", messages=for_client(conversation), temperature=0.0,
        extra_body=extra(m, k, return_token_ids=True), **{"max_tokens": NEW, **kwargs},
    )  # fmt: skip


def test_eight_clients_get_the_answers_of_generate(client, expected):
    def one(name):
        conversation, m, k = CASES[name]
        reply = ask(client, conversation, m, k)
        return name, reply.choices[0].token_ids, reply.usage

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(one, CASES)]
    wrong = {name: (ids, expected[name]["ids"]) for name, ids, _ in found if ids != expected[name]["ids"]}
    assert not wrong
    assert len({tuple(ids) for _, ids, _ in found}) > len(found) / 2
    for name, ids, usage in found:
        assert usage.prompt_tokens == expected[name]["prompt"]
        assert usage.prompt_tokens_details.visual_tokens == expected[name]["visual"]
        assert usage.completion_tokens == len(ids)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_is_the_answer_and_its_usage(client, expected):
    name = "three turns, new image m=7 m'=None"
    conversation, m, k = CASES[name]
    chunks = [*ask(client, conversation, m, k, stream=True, stream_options={"include_usage": True})]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected[name]["text"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.prompt_tokens == expected[name]["prompt"]
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 1


def test_answers_end_where_they_should(client, expected):
    name = max(expected, key=lambda name: len(expected[name]["text"]) if expected[name]["visual"] else 0)
    conversation, m, k = CASES[name]
    text = expected[name]["text"]
    assert ask(client, conversation, m, k, max_tokens=2).choices[0].finish_reason == "length"
    stop = text[len(text) // 2 :][:4]
    for stream in (False, True):
        reply = ask(client, conversation, m, k, stop=["never there", stop], stream=stream)
        if stream:
            chunks = [*reply]
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            found, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert (found, reason) == (text[: text.index(stop)], "stop")


def test_load_generators_get_answers_of_the_length_they_ask_for(client, expected):
    name = min(expected, key=lambda name: len(expected[name]["ids"]))
    conversation, m, k = CASES[name]
    extra_body = extra(m, k, ignore_eos=True)
    reply = client.chat.completions.create(
        model="tiny", messages=for_client(conversation), max_tokens=40, temperature=0, extra_body=extra_body
    )
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (40, "length")


def test_sampling_depends_on_its_seed(client):
    conversation = [user("what is it?", 0)]

    def sample(seed):
        return client.chat.completions.create(
            model="tiny", messages=for_client(conversation), temperature=1.5, seed=seed, max_tokens=NEW, top_p=0.99,
        ).choices[0].message.content  # fmt: skip

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_a_second_question_reads_only_what_is_new(client, server):
    server.engine.answerer.clear()
    before = server.engine.encoder.counts.tower_images
    first = ask(client, [user("what is it?", 3)], 7)
    conversation = [user("what is it?", 3), said(first.choices[0].message.content), user("which colour?")]
    second = ask(client, conversation, 7)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    assert server.engine.encoder.counts.tower_images == before + 1


MISTAKES = {
    "m above": ({"extra_body": extra(99)}, "num_visual_tokens=99.*1 to 12"),
    "m zero": ({"extra_body": {"chat_template_kwargs": {"processor_kwargs": {"num_visual_tokens": 0}}}}, "=0 is out of"),
    "m text": ({"extra_body": {"chat_template_kwargs": {"processor_kwargs": {"num_visual_tokens": "4"}}}}, "whole number"),
    "m elsewhere": ({"extra_body": {"num_visual_tokens": 4}}, "wrong place.*chat_template_kwargs"),
    "unknown count": ({"extra_body": {"chat_template_kwargs": {"processor_kwargs": {"tokens": 4}}}}, "takes num_visual"),
    "unknown field": ({"extra_body": {"beam": 4}}, "'beam' is not a field"),
    "another template": ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "processor_kwargs alone"),
    "too many tokens": ({"max_tokens": 5000}, "max_tokens=5000"),
    "several answers": ({"n": 2}, "n=2"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools=.*not supported"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format"),
    "temperature": ({"temperature": 9}, "temperature=9 must be a number from 0 to 2"),
    "empty stop": ({"stop": ""}, "stop must be"),
    "nothing asked": ({"messages": for_client([user(" ", 0)])}, "question 0 is empty"),
    "no messages": ({"messages": []}, "at least one message"),
    "half a character": ({"messages": [{"role": "user", "content": "\udcff"}]}, "half of a pair|no JSON|character"),
    "a role": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "needs a role"),
    "a late system message": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "only the first message",
    ),
    "a video": ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, "video_url"),
    "a long text": ({"messages": [{"role": "user", "content": "word " * 2000}]}, "at most"),
    "a question longer than fusion reads": (
        {"messages": for_client([user("why " * 250, 0)])}, "at most|tokens",
    ),
    "many images": ({"messages": for_client([user("what?", *[0] * 17)])}, "17 images; at most 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(client, name):
    changed, message = MISTAKES[name]
    request = {"model": "tiny", "messages": for_client([user("what?", 0)]), "max_tokens": 4, **changed}
    if name == "half a character":
        body = json.dumps({**request, "messages": [{"role": "user", "content": "\udcff"}]}).encode()
        reply = httpx().post(
            f"{client.base_url}chat/completions", content=body, headers={"Authorization": f"Bearer {KEY}"}
        )
        assert reply.status_code == 400, reply.text
        return
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.chat.completions.create(**request)
    assert len(error.value.body["message"]) <= 300
    assert "\n" not in error.value.body["message"]


def hostile_images():
    """Addresses of pictures that are none, or too much."""
    import base64
    import struct
    import zlib

    def uri(data, kind="image/png"):
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width, height, data=b""):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")

    whole = base64.b64decode(for_client([user("x", 0)])[0]["content"][0]["image_url"]["url"].partition(",")[2])
    found = {
        "empty": uri(b""), "text": uri(b"hello" * 40), "html": uri(b"<html><body>not found</body></html>" * 9),
        "svg": uri(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "image/svg+xml"),
        "pdf": uri(b"%PDF-1.7\n" + b"0" * 300), "pickle": uri(b"\x80\x04\x95" + b"x" * 300), "zip": uri(b"PK\x03\x04" + b"\0" * 99),
        "bomb": uri(png(60_000, 60_000)), "wide bomb": uri(png(2**31 - 1, 1)), "zero": uri(png(0, 5)),
        "no pixels": uri(png(50, 50)), "few pixels": uri(png(50, 50, b"\0" * 100)), "53 megapixels": uri(png(7300, 7300)),
        "bad base64": "data:image/png;base64,!!!!", "odd base64": "data:image/png;base64,abcde", "no base64": "data:image/png,abc",
        "no data": "data:", "no kind": "data:;base64,", "relative": "pic.png", "file": "file:///etc/passwd", "path": "/etc/passwd",
        "up": "../../../etc/passwd", "ftp": "ftp://example.com/a.png", "script": "javascript:alert(1)", "nothing": "", "spaces": "   ",
        "plain http": "http://example.com/a.png", "loopback": "https://127.0.0.1/a.png", "localhost": "https://localhost/a.png",
        "private": "https://10.0.0.1/a.png", "private 2": "https://192.168.1.1/a.png", "link local": "https://169.254.169.254/latest/",
        "v6 loopback": "https://[::1]/a.png", "mapped": "https://[::ffff:127.0.0.1]/a.png", "zero host": "https://0.0.0.0/a.png",
        "password": "https://user:secret@127.0.0.1/a.png", "port": "https://127.0.0.1:99999/a.png", "no host": "https:///a.png",
        "decimal": "https://2130706433/a.png", "number": 5, "list": ["x"],
    }  # fmt: skip
    for cut in (9, 40, len(whole) // 2, len(whole) * 3 // 4):
        found[f"cut at {cut}"] = uri(whole[:cut])
    return found


HOSTILE = hostile_images()


def test_hostile_pictures_are_refused_one_by_one(client, address):
    """None takes the server down, none reaches another request, and none says what this machine holds."""
    assert len(HOSTILE) >= 40
    for name, url in HOSTILE.items():
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        reply = httpx().post(
            f"{address}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
        )
        assert reply.status_code == 400, (name, reply.status_code, reply.text)
        message = reply.json()["error"]["message"]
        assert len(message) <= 300, (name, message)
        assert "root:" not in message
        assert "secret" not in message
    ask(client, [user("what?", 0)], 1)


def test_keys_names_and_paths_are_checked(address, client):
    web = httpx()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    own = {"Authorization": f"Bearer {KEY}"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        assert web.post(f"{address}/v1/chat/completions", json=body, headers=headers).status_code == 401
        assert web.get(f"{address}/v1/models", headers=headers).status_code == 401
    assert web.post(f"{address}/v1/chat/completions", json=body, headers=own).status_code == 200
    reply = web.post(f"{address}/v1/chat/completions", json={**body, "model": "other"}, headers=own)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert web.get(f"{address}/v1/nowhere").status_code == 404
    assert web.get(f"{address}/v1/chat/completions").status_code == 405
    assert web.get(f"{address}/health").json()["status"] == "ok"
    (model,) = client.models.list().data
    assert (model.id, model.max_num_visual_tokens) == ("tiny", 12)
    for content in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 20_000, b'{"messages": 1}'):
        reply = web.post(f"{address}/v1/chat/completions", content=content, headers=own)
        assert reply.status_code == 400, content[:20]


def test_metrics_count_requests_tokens_and_the_cache(address, client):
    def value(name):
        lines = httpx().get(f"{address}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = {name: value(name) for name in ("fusedvlm_requests_total", "fusedvlm_prompt_tokens_total")}
    reply = ask(client, [user("what is it?", 1)], 3)
    with pytest.raises(openai.BadRequestError):
        ask(client, [user("what is it?", 1)], 99)
    assert value("fusedvlm_requests_total") == before["fusedvlm_requests_total"] + 2
    assert value('fusedvlm_requests_total{status="400"}') >= 1
    assert value("fusedvlm_prompt_tokens_total") == before["fusedvlm_prompt_tokens_total"] + reply.usage.prompt_tokens
    assert value("fusedvlm_visual_cache_bytes") > 0
    assert value("fusedvlm_requests_running") == 0


def test_clients_that_hang_up_free_their_place(server, client, address):
    """In the middle of a stream, before the answer, and while the body is on its way."""
    host, port = address.removeprefix("http://").split(":")
    stream = ask(client, [user("what is it?", 0)], 3, stream=True, max_tokens=60)
    next(iter(stream))
    stream.close()
    body = json.dumps({"messages": for_client([user("what is it?", 1)]), "max_tokens": 60}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    for sent in (body, body[: len(body) // 2], b""):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(head.encode() + sent)
            time.sleep(0.02)
    until = time.monotonic() + 20
    while server.running and time.monotonic() < until:
        time.sleep(0.02)
    assert server.running == 0
    ask(client, [user("what?", 0)], 1)


def httpx():
    import httpx

    return httpx


def test_the_example_of_the_docs_answers(address, server, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    picture = for_client([user("x", 0)])[0]["content"][0]["image_url"]["url"]
    for shown, here in (("http://127.0.0.1:8000", address), ("SECRET", KEY), ("my-variant", "tiny"),
                        ("data:image/png;base64,...", picture)):  # fmt: skip
        assert shown in code
        code = code.replace(shown, here)
    exec(compile(code, "docs/serving.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.rstrip().endswith(" 4")
    settings = server.settings
    assert f"at most {30} seconds" in " ".join(page.split())
    assert settings.max_queue == 64


def test_slow_huge_and_too_many_requests_are_turned_away(folder):
    """With limits of a size that a test can exceed."""
    server = serving.build_server(
        serving.LocalOptions(str(folder / "ref"), device="cpu", name="tiny", max_image_bytes=2000)
    )
    server.settings = dataclasses.replace(server.settings, body_seconds=0.5, max_queue=2)
    web, body = httpx(), {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    with running(server) as address:
        host, port = address.removeprefix("http://").split(":")
        # A body that never comes, twice: there is no place for a third request, and then there is again.
        waiting = [socket.create_connection((host, int(port)), timeout=30) for _ in range(2)]
        for connection in waiting:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        until = time.monotonic() + 10
        while server.running < 2 and time.monotonic() < until:
            time.sleep(0.01)
        full = web.post(f"{address}/v1/chat/completions", json=body)
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        for connection in waiting:
            assert b" 408 " in connection.recv(4000).split(b"\r\n")[0]
            connection.close()
        assert web.post(f"{address}/v1/chat/completions", json=body).status_code == 200
        most = server.settings.max_body
        assert web.post(f"{address}/v1/chat/completions", content=b"x" * (most + 1)).status_code == 413

        def chunks():
            for _ in range(most // 2**16 + 2):
                yield b"x" * 2**16

        with contextlib.suppress(web.WriteError, web.RemoteProtocolError):  # it need not read what it does not take
            assert web.post(f"{address}/v1/chat/completions", content=chunks()).status_code == 413
        picture = for_client([user("what?", 2)])
        big = web.post(f"{address}/v1/chat/completions", json={**body, "messages": with_noise(picture)})
        assert (big.status_code, "at most 2,000 are taken" in big.text) == (400, True)
        assert server.running == 0


def test_an_m_that_was_not_trained_may_be_rounded_down(folder):
    server = serving.build_server(serving.LocalOptions(str(folder / "ref"), device="cpu", name="tiny", round_down=True))
    with running(server) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = {
            m: ask(client, [user("what is it?", 0)], m).usage.prompt_tokens_details.visual_tokens for m in (1, 6, 11)
        }
    assert asked == {1: 1, 6: 1, 11: 7}  # trained are 1, 7, 12


def with_noise(messages):
    """The same with a picture that cannot be packed into few bytes."""
    import numpy as np
    from PIL import Image

    from fusedvlm.tests.serving.api_cases import data_uri

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    content = [{"type": "image_url", "image_url": {"url": data_uri(noise)}}, messages[0]["content"][-1]]
    return [{"role": "user", "content": content}]


def test_memory_stays_flat_over_many_mixed_requests(folder):
    """Every request another image or question, through a cache that holds a few; FUSEDVLM_REQUESTS asks for more."""
    server = serving.build_server(
        serving.LocalOptions(
            str(folder / "ref"), device="cpu", name="tiny", cache_bytes=400_000, language_cache_bytes=400_000
        )
    )
    answerer = server.engine.answerer
    number = int(os.environ.get("FUSEDVLM_REQUESTS", "240"))
    memory = []
    for request in range(number):
        image = tiny.picture(request % 97, 30 + request % 60, 30 + request % 41)
        conversation = [user_message(image, f"{QUESTIONS[request % 4]} {request % 13}")]
        if request % 5 == 0:
            conversation += [tiny.assistant("a cat"), user_message([], "sure?")]
        prompts = answerer.prompts([conversation], 1 + request % 12)
        answerer.generate(prompts, max_new_tokens=2, do_sample=False)
        assert answerer.encoder.cache.num_bytes <= 400_000
        assert answerer.prefixes.cache.num_bytes <= 400_000
        if request % 40 == 39:
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
    kept = [size_of(entry) for entry in held(answerer.encoder.cache)]
    assert sum(kept) == answerer.encoder.cache.num_bytes
    assert answerer.encoder.cache.evictions > number / 4
    assert memory[-1] - memory[len(memory) // 2] < 24 * 2**20, [size // 2**20 for size in memory]


def held(cache):
    return [cache.peek(key) for key in cache.keys()]  # noqa: SIM118


def test_texts_of_several_threads_do_not_mix(server):
    """Tokenizers keep settings of a call in themselves: without a lock, markers of one prompt become text of another."""
    texts = [
        [user_message([], text)] for text in ("hello <image> </s> you", "plain", "<s> yes </s>", "what <|question|>")
    ]
    alone = [server.engine.answerer.prompts([text])[0].input_ids for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda n: server.engine.answerer.prompts([texts[n % 4]])[0].input_ids, range(400))]
    assert all(ids == alone[n % 4] for n, ids in enumerate(found))

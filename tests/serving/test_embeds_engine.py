"""The fusion service in front of a language model's server: the answers are those of `generate`."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusedvlm import serving
from fusedvlm.tests import fork_server
from fusedvlm.tests.serving.api_cases import CASES, NEW, extra, for_client, running, said, user, write_case
from fusedvlm.tests.serving.llm_stand_in import standing_in

for name in ("starlette", "uvicorn", "httpx", "prometheus_client"):
    pytest.importorskip(name, reason="serving is not installed (pip install 'fusedvlm[serve]')")
openai = pytest.importorskip("openai", reason="the client is not installed (pip install 'fusedvlm[test]')")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    write_case(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "answers.json").read_text())


@pytest.fixture(scope="module")
def llm(folder):
    with standing_in(folder / "llm") as found:
        yield found


@pytest.fixture(scope="module")
def server(folder, llm):
    return serving.build_server(
        serving.LocalOptions(str(folder / "ref"), device="cpu", name="tiny", llm_url=f"{llm[1]}/v1", max_tokens=64)
    )


@pytest.fixture(scope="module")
def client(server):
    with running(server) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(client, conversation, m=None, k=None, **kwargs):
    return client.chat.completions.create(
        model="tiny", messages=for_client(conversation), temperature=0.0,
        extra_body=extra(m, k, return_token_ids=True), **{"max_tokens": NEW, **kwargs},
    )  # fmt: skip


def test_eight_clients_get_the_answers_of_generate(client, server, expected):
    def one(name):
        conversation, m, k = CASES[name]
        reply = ask(client, conversation, m, k)
        return name, reply.choices[0].token_ids, reply.usage

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(one, CASES)]
    assert not {name: (ids, expected[name]["ids"]) for name, ids, _ in found if ids != expected[name]["ids"]}
    for name, ids, usage in found:
        assert (usage.prompt_tokens, usage.completion_tokens) == (expected[name]["prompt"], len(ids))
    assert server.engine.encoder.counts.tower_images == 4
    assert server.engine.context == 900  # what the language model's server says it reads
    assert not any(key.startswith("language_model.layers") for key in server.engine.model.state_dict())


def test_a_stream_is_the_answer(client, expected):
    name = "two turns m=7 m'=1"
    chunks = [*ask(client, *CASES[name], stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected[name]["text"]


@pytest.mark.parametrize(
    ("behave", "status", "message"),
    [("busy", 429, "busy"), ("refuse", 502, "refused .400.: I refuse"), ("cut", 502, "ended before the answer"),
     ("garbage", 502, "does not answer")],
)  # fmt: skip
def test_what_the_language_models_server_does_wrong_is_told(client, llm, behave, status, message):
    conversation = [user("what?", 0)]
    llm[0].behave = behave
    try:
        with pytest.raises(openai.APIStatusError, match=message) as error:
            ask(client, conversation, 3)
        assert error.value.status_code == status
        if behave == "cut":  # in a stream that has begun
            with pytest.raises(openai.APIError, match=message):
                list(ask(client, conversation, 3, stream=True))
    finally:
        llm[0].behave = ""
    assert ask(client, conversation, 3).choices[0].message.content


def test_a_client_that_hangs_up_ends_the_work_behind(client, llm, server):
    stand_in = llm[0]
    stand_in.behave = "slow"
    try:
        finished = stand_in.finished
        stream = ask(client, [user("what is it?", 0)], 3, stream=True, max_tokens=40)
        next(iter(stream))
        stream.close()
        until = time.monotonic() + 15
        while server.running and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        assert (server.running, stand_in.finished) == (0, finished)
    finally:
        stand_in.behave = ""


def test_a_server_that_is_not_there_is_told_at_once(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serving.build_server(
        serving.LocalOptions(str(folder / "ref"), device="cpu", llm_url=f"http://127.0.0.1:{port}")
    )
    with pytest.raises(ValueError, match=f"at http://127.0.0.1:{port} does not answer"):
        asyncio.run(server.start())


def start(arguments, log):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = str(Path(sys.executable).with_name("fusedvlm"))  # a stand-in would not pass the signal on
    return subprocess.Popen(
        [command, "serve", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=log,
        env=environment,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_the_command_serves_and_stops_when_its_answers_are_out(folder, tmp_path, llm):
    """With a conversation of two turns, and a signal in the middle of a stream, which still ends."""
    with (tmp_path / "log").open("w") as log:
        process = start(
            [str(folder / "ref"), "--port", "0", "--device", "cpu", "--api-key", "k", "--name", "tiny",
             "--engine", "embeds", "--llm-url", llm[1]], log,
        )  # fmt: skip
    try:
        address = None
        until = time.monotonic() + 120
        while address is None and time.monotonic() < until:
            text = (tmp_path / "log").read_text()
            address = next((word for word in text.split() if word.startswith("http://")), None)
            assert process.poll() is None, text
            time.sleep(0.1)
        client = openai.OpenAI(base_url=address, api_key="k", max_retries=10)
        first = ask(client, [user("what is it?", 0)], 3).choices[0].message.content
        ask(client, [user("what is it?", 0), said(first), user("which colour?")], 3)
        llm[0].behave = "slow"
        chunks = iter(ask(client, [user("yes or no", 0)], 12, stream=True))
        next(chunks)
        process.send_signal(signal.SIGTERM)
        assert [*chunks][-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(30) == 0
    finally:
        llm[0].behave = ""
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "does not exist"),
        (["{ref}", "--engine", "embeds"], "needs --llm-url"),
        (["{ref}", "--llm-url", "http://x"], "are for --engine embeds"),
        (["{ref}", "--vllm=--seed=1"], "--vllm is for --engine vllm"),
    ],
)
def test_wrong_use_ends_with_two(folder, arguments, message):
    words = [word.format(ref=folder / "ref") for word in arguments]
    done = subprocess.run([fork_server.executable("fusedvlm"), "serve", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr

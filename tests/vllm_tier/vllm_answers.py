"""vLLM with our plugin, and before our fusion service: `make test-vllm`, in an environment of its own.

FUSEDVLM_VLLM_CASE is a folder that `tests/serving/api_cases.py` wrote with this package's own versions: a tiny variant by
reference and merged, and the answers of `generate`. No file of it needs the newer transformers here.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import APIStatusError, BadRequestError, OpenAI

from fusedvlm.tests.serving.api_cases import CASES, NEW, extra, for_client, said, user

CASE = Path(os.environ["FUSEDVLM_VLLM_CASE"])
EXPECTED = json.loads((CASE / "answers.json").read_text())
SIZES = ["--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "16"]
ENVIRONMENT = {
    **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def program(name):
    return str(Path(sys.executable).with_name(name))


@contextmanager
def running(command, log, port, **environment):
    """Address of a server, once /health answers."""
    import httpx

    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**ENVIRONMENT, **environment})
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            try:
                if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(client, conversation, m=None, k=None, **kwargs):
    return client.chat.completions.create(
        model="tiny", messages=for_client(conversation), temperature=0.0,
        extra_body=extra(m, k, return_token_ids=True), **{"max_tokens": NEW, **kwargs},
    )  # fmt: skip


def differences(client):
    """{case: answer} of those that are not the answers of `generate`, asked by eight clients at once, twice."""

    def one(name):
        reply = ask(client, *CASES[name])
        return name, list(reply.choices[0].token_ids), reply.usage.prompt_tokens

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(one, [*CASES, *reversed(CASES)])]
    assert {name: length for name, _, length in found if length != EXPECTED[name]["prompt"]} == {}
    return {name: (ids, EXPECTED[name]["ids"]) for name, ids, _ in found if ids != EXPECTED[name]["ids"]}


@pytest.mark.parametrize("kind", ["ref", "merged"])
def test_the_plugin_answers_as_generate(tmp_path, kind):
    command = [
        program("fusedvlm"), "serve", str(CASE / kind), "--engine", "vllm", "--port", "8311", "--name", "tiny",
        "--api-key", "secret", "--dtype", "float32", *(f"--vllm={word}" for word in SIZES),
    ]  # fmt: skip
    with running(command, tmp_path / "log", 8311) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert differences(client) == {}
        text = "".join(
            chunk.choices[0].delta.content or "" for chunk in ask(client, *CASES["two turns m=7 m'=1"], stream=True)
        )
        assert text == EXPECTED["two turns m=7 m'=1"]["text"]
        for messages, m, message in (
            (for_client([user("what?", 0)]), 99, "num_visual_tokens=99"),
            (for_client([user(" ", 0)]), 7, "question 0 is empty"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://127.0.0.1/a.png"}},
                                           {"type": "text", "text": "what?"}]}], 7, "private network"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}},
                                           {"type": "text", "text": "what?"}]}], 7, "not an image|cannot"),
        ):  # fmt: skip
            with pytest.raises(BadRequestError, match=message):
                client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, extra_body=extra(m))
        with pytest.raises(APIStatusError) as error:
            OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        assert error.value.status_code == 401
        ask(client, [user("what is it?", 0), said("a cat"), user("sure?")], 3)


def test_the_fusion_service_before_a_plain_llm_server_answers_as_generate(tmp_path):
    """vLLM has nothing of ours here; the service runs in this environment too."""
    llm = [
        program("vllm"), "serve", str(CASE / "llm"), "--port", "8312", "--enable-prompt-embeds", "--dtype", "float32", *SIZES,
    ]  # fmt: skip
    with running(llm, tmp_path / "llm.log", 8312, VLLM_PLUGINS="") as upstream:
        command = [
            program("fusedvlm"), "serve", str(CASE / "ref"), "--engine", "embeds", "--llm-url", upstream, "--port", "8313",
            "--name", "tiny", "--device", "cpu",
        ]  # fmt: skip
        with running(command, tmp_path / "fusion.log", 8313) as address:
            client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            assert differences(client) == {}
            chunks = [*ask(client, *CASES["two turns m=7 m'=1"], stream=True)]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == EXPECTED["two turns m=7 m'=1"]["text"]
            with pytest.raises(BadRequestError, match="num_visual_tokens=99"):
                ask(client, [user("what?", 0)], 99)


def test_stock_vllm_refuses_instead_of_answering_wrongly(tmp_path):
    """The merged variant under vLLM's generic transformers backend, which keeps the question from the processor."""
    code = f"""
from vllm import LLM, SamplingParams
from PIL import Image
llm = LLM({str(CASE / "merged")!r}, dtype="float32", max_model_len=512, enforce_eager=True, model_impl="transformers",
          trust_remote_code=True, limit_mm_per_prompt={{"image": 1}})
print("LOADED")
out = llm.generate({{"prompt": "<image>what is it?", "multi_modal_data": {{"image": Image.new("RGB", (60, 40))}}}},
                   SamplingParams(max_tokens=4))
print("ANSWERED", out[0].outputs[0].token_ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", f"if __name__ == '__main__':\n{''.join('    ' + line + chr(10) for line in code.splitlines())}"],
        capture_output=True, text=True, cwd=tmp_path, env={**ENVIRONMENT, "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )  # fmt: skip
    assert "ANSWERED" not in done.stdout
    assert done.returncode != 0
    assert "depend on the question" in done.stderr + done.stdout, (done.stdout + done.stderr)[-3000:]

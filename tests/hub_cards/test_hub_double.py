"""`fusedvlm hub-double` as a user starts and ends it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from fusedvlm.hub_double.cli import variables
from fusedvlm.hub_double.hub_server import HubServer

PYTHON = sys.executable  # the real one: its stand-in for these tests passes no signals on
OURS = "export HF_ENDPOINT=http://127.0.0.1:1\nexport HF_TOKEN=hf_earlier\n"


def start(*words, cwd, **options) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.Popen(
        [PYTHON, "-c", "from fusedvlm.cli import main; main()", "hub-double", *words],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=inherited, **options,
    )  # fmt: skip


def read_env(text: str) -> dict[str, str]:
    return dict(line.removeprefix("export ").split("=", 1) for line in text.splitlines())


def ask(path: str, env: dict[str, str]) -> dict:
    request = urllib.request.Request(env["HF_ENDPOINT"] + path, headers={"Authorization": f"Bearer {env['HF_TOKEN']}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_file_is_there_as_long_as_the_hub_is(tmp_path, number):
    env = tmp_path / "new" / "hub.env"
    hub = start("--env", str(env), "--user", "grace", cwd=tmp_path)
    while not env.exists():
        assert hub.poll() is None, hub.communicate()
        time.sleep(0.02)
    assert ask("/api/whoami-v2", read_env(env.read_text()))["name"] == "grace"
    hub.send_signal(number)
    out, err = hub.communicate(timeout=60)
    assert (hub.returncode, out) == (0, "")
    assert not env.exists()
    assert "source" in err
    assert "unset HF_ENDPOINT HF_TOKEN" in err


def test_without_a_file_the_variables_are_what_it_prints(tmp_path):
    hub = start(cwd=tmp_path)
    env = read_env(hub.stdout.readline() + hub.stdout.readline())
    assert ask("/api/whoami-v2", env)["name"] == "ada"
    hub.terminate()
    assert hub.communicate(timeout=60)[0] == ""
    assert hub.returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--user", "a; rm -rf x"], "is no name on the Hub"),
        (["--env", "."], "is a folder"),
        (["--env", "mine.env"], "is not of an earlier Hub"),
        (["--env", "nobody/here.env", "--port", "{taken}"], "without --port a free one is taken"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_file(tmp_path, words, said):
    (tmp_path / "mine.env").write_text("export SECRET=1\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = [word.format(taken=other.getsockname()[1]) for word in words]
        hub = start(*words, cwd=tmp_path)
        out, err = hub.communicate(timeout=60)
    assert (hub.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line
    assert (tmp_path / "mine.env").read_text() == "export SECRET=1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.env"]


def test_a_file_of_an_earlier_hub_is_replaced_and_a_later_one_is_left(tmp_path):
    env = tmp_path / "hub.env"
    env.write_text(OURS)
    hub = start("--env", str(env), cwd=tmp_path)
    while env.read_text() == OURS:
        assert hub.poll() is None, hub.communicate()
        time.sleep(0.02)
    env.write_text(OURS)  # another one has begun
    hub.terminate()
    hub.communicate(timeout=60)
    assert env.read_text() == OURS


def test_a_proxy_is_gone_round():
    lines = variables("http://127.0.0.1:5", "hf_x", {"HTTP_PROXY": "http://proxy:3128", "no_proxy": "intern"})
    script = f"export no_proxy=intern; unset NO_PROXY; {lines} echo $no_proxy $NO_PROXY"
    said = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["127.0.0.1,localhost,intern", "127.0.0.1,localhost"]


def test_the_command_imports_nothing_heavy(tmp_path):
    script = "import sys, fusedvlm.hub_double.cli; print({'torch', 'transformers', 'huggingface_hub'} & {*sys.modules})"
    said = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


@pytest.fixture
def plain_hub(tmp_path):
    with HubServer(tmp_path / "content") as server:
        yield server


def raw(server: HubServer, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b"\xff"])
def test_a_request_that_is_unreadable_is_answered(plain_hub, body):
    token = {"Authorization": f"Bearer {plain_hub.add_user('ada')}"}
    status, answer = raw(plain_hub, "POST", "/api/repos/create", body, token)
    assert status == 400
    assert answer["error"]
    assert plain_hub.store.repos == {}


def test_a_commit_of_which_half_arrives_is_none(plain_hub):
    token = plain_hub.add_user("ada")
    repo = plain_hub.store.create("ada/x", True, "ada")
    lines = b'{"key": "header", "value": {"summary": "s"}}\n{"key": "file", "value": {"path": "a", "content": ""}}\n'
    head = (
        f"POST /api/models/ada/x/commit/main HTTP/1.1\r\nAuthorization: Bearer {token}\r\nContent-Length: 999\r\n\r\n"
    )
    with socket.create_connection(plain_hub.server_address) as client:
        client.sendall(head.encode() + lines)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert len(repo.commits) == 1


def test_two_requests_at_once_are_answered_one_after_the_other(plain_hub):
    token = {"Authorization": f"Bearer {plain_hub.add_user('ada')}"}
    statuses = []
    body = json.dumps({"name": "same", "private": True}).encode()
    threads = [
        threading.Thread(target=lambda: statuses.append(raw(plain_hub, "POST", "/api/repos/create", body, token)[0]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 7

"""What a Hub, or something between here and the Hub, may answer: a state with the right types, or one line about it."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import PushError
from fusedvlm.hub_cards.push.difference import LocalFile, difference, look
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests.fuzz.harness import Target, explore, json_cases, judge

REPO = "ada/fusedvlm-m4"
ROUTES = (
    ("refs", "/refs"),
    ("tree", "/tree/"),
    ("commits", "/commits/"),
    ("whoami", "/whoami"),
    ("model", "/api/models/"),
)
IDENTITY = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Odd(BaseHTTPRequestHandler):
    """Answers what the case says: `{"model": {"status", "headers", "body"}, "tree": ..., "refs": ...}`."""

    protocol_version = "HTTP/1.1"
    answers: dict = {}

    def do_GET(self, with_body: bool = True):
        route = next((name for name, part in ROUTES if part in self.path), "file")
        answer = Odd.answers.get(route) if isinstance(Odd.answers, dict) else None
        answer = answer if isinstance(answer, dict) else {}
        status, body, headers = answer.get("status", 200), answer.get("body"), answer.get("headers")
        status = status if isinstance(status, int) and 200 <= status <= 599 and status not in (204, 304) else 500
        data = body.encode("utf-8", "replace") if isinstance(body, str) else json.dumps(body).encode()
        self.send_response_only(status)
        for name, value in headers.items() if isinstance(headers, dict) else ():
            if re.fullmatch(r"[A-Za-z-]+", name) and name.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(name, re.sub(r"[^ -~]", "?", str(value))[:300])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def do_HEAD(self):
        self.do_GET(with_body=False)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def target():
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = Hub(f"http://127.0.0.1:{server.server_port}", "hf_" + "a" * 20, retry_policy())
        yield Target("hub", lambda case, folder: read_answers(hub, case), (REPO,), json_cases(), (PushError,))
        server.shutdown()


def retry_policy():
    """As short as it gets: nothing here is worth another try."""
    return RetryPolicy(attempts=1, first_wait=0.0, longest_backoff=0.0, longest_wait=0.0, timeout=5.0)


def read_answers(hub: Hub, case: bytes) -> None:
    """Look at a repository and compare it with two files."""
    Odd.answers = json.loads(case)
    state = look(hub, REPO)
    if state is None:
        return
    assert isinstance(state.head, str)
    assert IDENTITY.fullmatch(state.head), state.head
    assert isinstance(state.private, bool)
    for path, file in state.files.items():
        assert isinstance(path, str)
        assert path
        assert type(file.size) is int
        assert file.size >= 0
        assert isinstance(file.identity, str)
    for tag, commit in state.tags.items():
        assert isinstance(tag, str)
        assert isinstance(commit, str)
    files = {path: LocalFile.read(path, path.encode()) for path in ("README.md", "config.json")}
    found = difference(hub, REPO, files, state)
    assert {*found.add, *found.change, *found.keep} == set(files)


CASES = Target("hub", lambda case, folder: None, (), json_cases()).corpus()


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its own retries


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_the_corpus(path, target, tmp_path):
    kind = judge(target, path.read_bytes(), tmp_path)
    assert kind == "clean" or not path.name.startswith("seed-")


@pytest.mark.timeout(0)
def test_damaged_answers(target, tmp_path):
    seen = explore(target, tmp_path)
    assert seen["clean"]
    assert seen["refused"]

"""What stands between here and the Hub: JSON of its own at any call, and proxies that repeat the token in any encoding."""

import base64
import codecs
import sys
import traceback

import pytest
from huggingface_hub import constants

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import PushError
from fusedvlm.hub_cards.push.collection import collect
from fusedvlm.hub_cards.push.push_repository import push
from fusedvlm.redaction import LEFT_OUT, redact, redacted_traceback
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests.hub_cards.faulty_hub import Fault
from fusedvlm.tests.hub_cards.synthetic import complete, release

TOKEN = "hf_AbCdEfGh1234567890ijKLmnOPqrstUVwx"
ENCODINGS = {
    "plain": str,
    "lower": str.lower,
    "reversed": lambda t: t[::-1],
    "rot13": lambda t: codecs.encode(t, "rot13"),
    "base64": lambda t: base64.b64encode(f"Bearer {t}".encode()).decode(),
    "base64 of user and token": lambda t: base64.urlsafe_b64encode(f"x:{t}".encode()).decode().rstrip("="),
    "base64 twice": lambda t: base64.b64encode(base64.b64encode(t.encode())).decode(),
    "base64 in lines": lambda t: "\n".join(base64.b64encode(t.encode()).decode()[i : i + 10] for i in range(0, 52, 10)),
    "base32": lambda t: base64.b32encode(t.encode()).decode(),
    "base85": lambda t: base64.b85encode(t.encode()).decode(),
    "hex": lambda t: t.encode().hex(),
    "hex with colons": lambda t: t.encode().hex(":"),
    "hex with spaces": lambda t: t.encode().hex(" "),
    "percent": lambda t: "".join(f"%{byte:02X}" for byte in t.encode()),
    "HTML": lambda t: "".join(f"&#{byte};" for byte in t.encode()),
    "JSON escapes": lambda t: "".join(f"\\u{byte:04x}" for byte in t.encode()),
    "quoted-printable": lambda t: "".join(f"={byte:02X}" for byte in t.encode()),
    "code points": lambda t: " ".join(str(byte) for byte in t.encode()),
    "octal": lambda t: " ".join(f"{byte:o}" for byte in t.encode()),
    "letters apart": " ".join,
    "with dots": ".".join,
    "in pieces": lambda t: " ".join(t[i : i + 5] for i in range(0, len(t), 5)),
    "half of it": lambda t: t[: len(t) // 2],
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_token_is_seen_in_any_encoding(name):
    said = f"gateway: {ENCODINGS[name](TOKEN)} is not allowed"
    told = redact(said, [TOKEN])
    assert "***" in told or told == LEFT_OUT
    assert ENCODINGS[name](TOKEN) not in told


@pytest.mark.parametrize(
    "text",
    [
        "403 Forbidden for url https://huggingface.co/api/models/ada/tiny-m4/commit/main (Request ID: Root=1-65a;4c53a1)",
        "tag v1.0 is at commit 0123456789abcdef0123456789abcdef01234567, which holds other content",
        "model-00001-of-00002.safetensors: not what config.json asks for, [4096, 1024] and 32000 rows",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text, [TOKEN]) == text


def test_passwords_in_addresses_go():
    assert redact("ProxyError: http://ada:geheim@proxy:8080/ refuses") == "ProxyError: http://***@proxy:8080/ refuses"


def test_a_traceback_has_its_frames_and_no_token():
    try:
        try:
            raise OSError(f"sent {TOKEN}")
        except OSError as error:
            raise ValueError(f"failed: {TOKEN[::-1]}") from error
    except ValueError as error:
        told = redacted_traceback(error, [TOKEN])
    assert "test_a_traceback_has_its_frames_and_no_token" in told
    assert told.index("OSError: sent ***") < told.index("ValueError: failed: ***")


@pytest.fixture
def hub(hub_server, user, online):
    return Hub(hub_server.endpoint, user, RetryPolicy(attempts=3, first_wait=0.0, timeout=5.0))


CALLS = [
    "whoami",
    "/api/models/ada/tiny-m4",
    "/tree/",
    "/refs",
    "/repos/create",
    "/preupload/",
    "/commit/",
    "/tag/",
    "/settings",
]


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"error": "x"}'])
@pytest.mark.parametrize("call", CALLS)
def test_json_that_is_not_the_hubs_is_not_believed(hub, hub_server, tmp_path, call, body):
    wish = release(4, tmp_path)
    fault = Fault(1, "json", body=body, matching=lambda method, path: call in path)
    hub_server.fault = fault
    push([wish], hub, public=True)
    assert fault.hits == 1
    assert complete(hub_server, wish)


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null"])
@pytest.mark.parametrize("call", [*CALLS[:6], "/api/collections"])
def test_json_that_never_is_the_hubs_is_one_line_that_says_so(hub, hub_server, tmp_path, call, body):
    hub_server.fault = Fault(1, "json", body=body, times=999, matching=lambda method, path: call in path)

    def everything():
        push([release(4, tmp_path)], hub)
        collect(hub, "Title", "ada", {"ada/tiny-m4": "m = 4"})

    with pytest.raises(PushError, match=r"^(account|ada/tiny-m4|collection ada/.*): ") as error:
        everything()
    assert "\n" not in str(error.value)
    assert "in its place" in str(error.value) or "does not show it" in str(error.value)
    assert not str(error.value).endswith(("'slug'", "'name'", "'id'"))


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_a_proxy_repeats_is_in_no_error_and_no_log(hub, hub_server, user, tmp_path, caplog, capfd, name):
    encode = ENCODINGS[name]
    hub_server.fault = Fault(1, "echo", 403, times=99, encode=encode, matching=lambda m, path: "/commit/" in path)
    with pytest.raises(PushError) as error:
        push([release(4, tmp_path)], hub)
    told = "".join([*traceback.format_exception(error.value), *capfd.readouterr()])
    assert "this gateway" in told or LEFT_OUT in told
    assert " ".join(encode(user).split()) not in " ".join(told.split())
    assert user not in told


@pytest.mark.parametrize("name", ["plain", "base64", "letters apart"])
def test_the_command_line_shows_no_token_with_debug(hub_server, user, online, monkeypatch, capsys, name):
    from fusedvlm import cli

    monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
    monkeypatch.setenv("HF_TOKEN", user)
    monkeypatch.setattr(sys, "argv", ["fusedvlm", "--debug", "space", "ada/tiny"])
    encode = ENCODINGS[name]
    hub_server.fault = Fault(1, "echo", 403, times=99, encode=encode)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = "".join(capsys.readouterr())
    assert ended.value.code == 1
    assert "Traceback (most recent call last)" in told
    assert " ".join(encode(user).split()) not in " ".join(told.split())


def test_a_long_call_is_not_silent(hub, monkeypatch, capfd):
    import threading

    monkeypatch.setattr("fusedvlm.hub_cards.hub_client.SILENCE", 0.02)
    hub.ask("ada/x", lambda: threading.Event().wait(0.3))
    assert "ada/x: still waiting for the Hub (0 s)" in capfd.readouterr().err


def test_hf_xet_does_not_repeat_for_minutes_by_itself(hub):
    import os

    assert int(os.environ["HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"]) <= 2

"""Errors in one line, waits in seconds."""

import json
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from fusedvlm.hub_cards.hub_errors import LongWait, explain, http, is_transient, one_line, requested_wait, unwrap


def answer(status: int, **headers: str) -> HfHubHTTPError:
    response = http.Response(status, headers=headers, request=http.Request("POST", "http://hub/api"))
    return HfHubHTTPError("refused\nwith more lines", response=response, server_message="said the Hub")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "12"}, 12.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-3"}, None),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "1"}, 55.0),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"Retry-After": format_datetime(datetime.now(timezone.utc) - timedelta(hours=1), usegmt=True)}, 0.0),
    ],
)
def test_the_wait_that_is_asked_for(headers, seconds):
    assert requested_wait(http.Headers(headers)) == seconds


def test_a_wait_until_a_date():
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    assert 80 < requested_wait(http.Headers({"Retry-After": date})) < 91


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (answer(503), True),
        (answer(429), True),
        (answer(403), False),
        (answer(412), False),
        (http.ConnectTimeout("x"), True),
        (http.RemoteProtocolError("x"), True),
        (http.UnsupportedProtocol("x"), False),
        (json.JSONDecodeError("x", "", 0), True),
        (ValueError("x"), False),
        (RuntimeError("from hf_xet"), True),
        (caused(RuntimeError("upload"), answer(403)), False),
        (caused(LocalEntryNotFoundError("download"), http.ReadError("x")), True),
        (LongWait(900.0), False),
        (FileNotFoundError("x"), False),
    ],
    ids=lambda value: value if isinstance(value, bool) else type(value).__name__,
)
def test_what_may_pass_by_itself(error, transient):
    assert is_transient(unwrap(error)) is transient


def test_no_token_survives_in_a_line():
    text = one_line("Bearer hf_abcdefghijkl\n and secret-of-mine", secret="secret-of-mine")
    assert text == "*** and ***"


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 412, 418, 429, 500, 503])
def test_every_status_is_one_line_that_names_the_repository(status):
    error = explain(answer(status), "ada/x")
    assert str(error).startswith("ada/x: ")
    assert "\n" not in str(error)
    assert error.status == status

"""What goes wrong while talking to the Hub, told in one line that names the repository."""

import importlib
import json
import re
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from fusedvlm.redaction import known_secrets, redact
from fusedvlm.retry import TRANSIENT_STATUS, retry_after
from fusedvlm.wording import fit

# huggingface_hub speaks through httpx up to 1.x and through httpx2 since 2.0; its own error derives from the right one.
http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

# What huggingface_hub raises when an answer is JSON, but not the Hub's: `{}`, `[]` or `null` from something in between.
ODD_ANSWERS = (LookupError, TypeError, AttributeError)
# Everything a call through huggingface_hub is known to raise; ValueError and RuntimeError wrap answers and uploads.
CALL_ERRORS = (http.HTTPError, OSError, ValueError, RuntimeError, *ODD_ANSWERS)
TRANSIENT_TRANSPORT = (http.TimeoutException, http.NetworkError, http.RemoteProtocolError, http.ProxyError)
AGAIN = "run the same command again, it goes on where it stopped"
SAID = 140  # characters of what others say


class PushError(RuntimeError):
    """Something at the Hub, on the way there or in the account. The message is one line.

    Args:
        message: one line that names the repository.
        status: HTTP status behind it, None when there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Conflict(PushError, ValueError):
    """What is on the Hub contradicts what was asked for; the user has to decide."""


class LongWait(RuntimeError):
    """The Hub asks to wait longer than a program should without asking back.

    Args:
        seconds: the wait that was asked for.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the Hub asks to wait {seconds:.0f} s")
        self.seconds = seconds


class OddAnswer(RuntimeError):
    """An answer that huggingface_hub cannot read: valid JSON, but not what the Hub says; a gateway's, for example.

    Args:
        error: what huggingface_hub stumbled over.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {one_line(error)[:80]}")


def unwrap(error: BaseException) -> BaseException:
    """The reason inside what huggingface_hub raises around failed uploads and downloads."""
    while error.__cause__ is not None and (type(error) is RuntimeError or isinstance(error, LocalEntryNotFoundError)):
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """HTTP status behind an error, None when there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_odd(error: BaseException) -> bool:
    """Whether an error says that an answer was JSON, but not the Hub's."""
    if type(error) is ValueError:  # huggingface_hub's own look at an answer
        return re.search(r"improperly formatted|malformed", str(error), re.IGNORECASE) is not None
    return isinstance(error, (OddAnswer, *ODD_ANSWERS))


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        return error.response.status_code in TRANSIENT_STATUS
    if isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError | LongWait):
        return False
    if isinstance(error, (*TRANSIENT_TRANSPORT, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return True
    if is_odd(error) or isinstance(error, json.JSONDecodeError):
        return True  # a gateway's page in the place of an answer; a ValueError, but nobody's wrong input
    return type(error) is RuntimeError  # hf_xet's, which says no more


def requested_wait(headers: Any) -> float | None:
    """Seconds that an answer asks to wait (`RateLimit`, else `Retry-After`, a number or a date), or None."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return retry_after(headers)


def one_line(text: object, secret: str | None = None) -> str:
    """Text without line breaks and without secrets, in whatever encoding somebody repeats them."""
    return redact(" ".join(str(text).split()), [*known_secrets(), *([secret] if secret else [])])


def silence(error: BaseException, secret: str | None = None) -> None:
    """Take secrets out of an error and of everything behind it, so that no traceback shows them."""
    secrets = [*known_secrets(), *([secret] if secret else [])]
    seen: set[int] = set()
    cause: Any = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause.args = tuple(redact(part, secrets) if isinstance(part, str) else part for part in cause.args)
        if isinstance(getattr(cause, "server_message", None), str):
            cause.server_message = redact(cause.server_message, secrets)
        cause = cause.__cause__ or cause.__context__


def explain(error: BaseException, about: str, secret: str | None = None) -> PushError:
    """The one line for an error of a call about `about` (a repository, or what else was asked for)."""
    status = status_of(error)
    if is_odd(error) and isinstance(error, Exception) and not isinstance(error, OddAnswer):
        error = OddAnswer(error)
    for kinds, text in _BY_KIND:
        if isinstance(error, kinds):
            return PushError(f"{about}: {text.format(error=fit(one_line(error, secret), SAID), again=AGAIN)}", status)
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return Conflict(f"{about}: the Hub refuses the card: {fit(one_line(error, secret), SAID)}")
    said = fit(one_line(getattr(error, "server_message", None) or error, secret), SAID)
    if status is None:
        return PushError(f"{about}: {said or type(error).__name__}; {AGAIN}")
    return PushError(f"{about}: {_BY_STATUS.get(status, _OTHER).format(status=status, said=said, again=AGAIN)}", status)


_BY_KIND = (
    (OfflineModeIsEnabled, "offline mode is on; unset HF_HUB_OFFLINE and run again"),
    (LocalTokenNotFoundError, "no token; run `hf auth login` or set HF_TOKEN to one that may write"),
    (LongWait, "rate limit, {error}; wait that long, then {again}"),
    (GatedRepoError, "access is gated and was not granted to this token; ask for it on the repository's page"),
    (RepositoryNotFoundError, "not found, or private and not visible to this token"),
    (http.TimeoutException, "the Hub does not answer in time; {again}"),
    ((http.TransportError, ConnectionError, TimeoutError), "no connection to the Hub ({error}); {again}"),
    (OddAnswer, "something between here and the Hub answers in its place ({error}); {again}"),
    (json.JSONDecodeError, "something between here and the Hub answers in its place, not in JSON; {again}"),
)
_OTHER = "the Hub answers {status}: {said}"
_BY_STATUS = {
    401: "the Hub does not accept the token (expired, revoked or mistyped); run `hf auth login` or set HF_TOKEN",
    402: "the Hub asks for payment: {said}",
    403: "the token may not do this: {said}; use one with write permission there, or --create-pr",
    409: "the Hub reports a conflict: {said}",
    412: "somebody else keeps committing to it; wait until they are done, then {again}",
    429: "rate limit; wait a few minutes, then {again}",
    **dict.fromkeys((500, 502, 503, 504), "the Hub is in trouble (status {status}); {again}"),
}

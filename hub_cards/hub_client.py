"""huggingface_hub's API for long, unattended work: every call is repeated while that can help, with bounded waits."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from fusedvlm.console import say
from fusedvlm.redaction import known_secrets, redact
from fusedvlm.retry import RetryPolicy

from .hub_errors import (
    CALL_ERRORS,
    LongWait,
    OddAnswer,
    PushError,
    explain,
    is_transient,
    requested_wait,
    silence,
    status_of,
    unwrap,
)

Answer = TypeVar("Answer")
SILENCE = 30.0  # seconds without a word
# hf_xet repeats for minutes by itself and says nothing; here the repeating is this module's, which does.
XET_RETRIES = {
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "500ms",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "10s",
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "20s",
    "HF_XET_CLIENT_READ_TIMEOUT": "60s",
}


class _Redacted(logging.Filter):
    """Log records of libraries without secrets: a server's warnings are passed on word by word."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), known_secrets()), ()
        return True


def redact_logs() -> None:
    """Let huggingface_hub log no secrets."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(known, _Redacted) for known in handler.filters):
            handler.addFilter(_Redacted())


class Hub:
    """An `HfApi` whose calls are tried again while that can help. `ask` makes one call.

    Args:
        endpoint: base URL; by default HF_ENDPOINT or the public Hub.
        token: by default the one of `hf auth login` or HF_TOKEN. It is never shown.
        retry_policy: how often and how long a call is tried again.
    """

    def __init__(
        self, endpoint: str | None = None, token: str | None = None, retry_policy: RetryPolicy | None = None
    ) -> None:
        self.api = HfApi(endpoint=endpoint, token=token, library_name="fusedvlm")
        self.retry_policy = retry_policy or RetryPolicy()
        for name, value in XET_RETRIES.items():
            os.environ.setdefault(name, value)
        redact_logs()

    @property
    def token(self) -> str | None:
        """The token in use."""
        return self.api.token if isinstance(self.api.token, str) and self.api.token else get_token()

    def check_token(self) -> None:
        """Refuse a token that cannot be sent, before a library puts it into its complaint.

        Raises:
            PushError: when there is none.
            ValueError: when it has characters that no token has.
        """
        token = self.token
        if token is None:
            raise explain(LocalTokenNotFoundError(), "Hub")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(
                f"The token ({len(token)} characters) has characters that no token has; set HF_TOKEN anew."
            )

    def ask(self, about: str, call: Callable[[], Answer], sane: Callable[[Answer], bool] | None = None) -> Answer:
        """Make a call until it succeeds or cannot.

        Args:
            about: the repository, for messages.
            call: does the same when called again.
            sane: whether an answer can be the Hub's; one that cannot counts as a failed attempt.

        Raises:
            PushError: one line that names `about`.
        """
        for attempt in range(1, self.retry_policy.attempts + 1):
            try:
                with self.bounded(about):
                    answer = call()
                if sane is not None and not sane(answer):
                    raise OddAnswer(ValueError("without what was asked for"))
                return answer
            except CALL_ERRORS as error:
                self.wait_or_raise(error, about, attempt)
        raise AssertionError("the last attempt returns or raises")

    def wait_or_raise(self, error: BaseException, about: str, attempt: int, transient: bool | None = None) -> None:
        """After attempt number `attempt` failed: wait, or raise the one line when that would not help."""
        if isinstance(error, PushError):
            raise error
        error = unwrap(error)
        silence(error, self.token)
        transient = is_transient(error) if transient is None else transient
        if not transient or attempt >= self.retry_policy.attempts:
            raise explain(error, about, self.token) from error
        wait = self.wait_after(error, attempt)
        reason = f"status {status_of(error)}" if status_of(error) else type(error).__name__
        say(f"{about}: {reason}; attempt {attempt + 1} of {self.retry_policy.attempts} in {wait:.0f} s")
        time.sleep(wait)

    def wait_after(self, error: BaseException, attempt: int) -> float:
        """Seconds until the next attempt: what the Hub asked for, else doubled each time."""
        response = getattr(error, "response", None)
        asked = requested_wait(response.headers) if response is not None else None
        return self.retry_policy.wait_after(attempt, asked)

    def bounded(self, about: str) -> "_Bounded":
        """Within this context no connection of huggingface_hub's waits forever: it has no timeout of its own.

        A call that takes long is said to, so that nobody looks at a silent terminal.
        """
        return _Bounded(self.retry_policy, about)


class _Bounded:
    """Timeout on huggingface_hub's shared session, and an end to waits that it would sleep through by itself.

    The session belongs to the process, so two threads must not push at once.
    """

    def __init__(self, policy: RetryPolicy, about: str) -> None:
        self.policy, self.about = policy, about
        self.done = threading.Event()

    def say_waiting(self) -> None:
        """Say every half minute that the call still runs."""
        seconds = SILENCE
        while not self.done.wait(SILENCE):
            say(f"{self.about}: still waiting for the Hub ({seconds:.0f} s)")
            seconds += SILENCE

    def __enter__(self) -> None:
        threading.Thread(target=self.say_waiting, daemon=True).start()
        self.session = get_session()
        self.before = self.session.timeout, self.session.event_hooks
        self.session.timeout = self.policy.timeout
        hooks = self.session.event_hooks
        self.session.event_hooks = {**hooks, "response": [*hooks.get("response", []), self.refuse_long_wait]}

    def __exit__(self, *error: Any) -> None:
        self.done.set()
        self.session.timeout, self.session.event_hooks = self.before

    def refuse_long_wait(self, response: Any) -> None:
        """huggingface_hub sleeps for whatever an answer asks; stop where nobody would want to."""
        if response.status_code not in (429, 503):
            return
        asked = requested_wait(response.headers)
        if asked is not None and asked > self.policy.longest_wait:
            raise LongWait(asked)

"""huggingface_hub's API for long, unattended work: every call is repeated while that can help, with bounded waits."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from fusedvlm.console import say

from .hub_errors import (
    CALL_ERRORS,
    LongWait,
    PushError,
    explain,
    is_transient,
    requested_wait,
    status_of,
    unwrap,
)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Args:
        attempts: how often a call is made at most.
        first_wait: seconds before the second attempt; doubled each time.
        longest_backoff: seconds between attempts at most when the Hub asks for nothing.
        longest_wait: seconds that are waited at most when the Hub asks for them; more ends the run with a line.
        timeout: seconds without a byte after which a connection counts as dead.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_backoff: float = 30.0
    longest_wait: float = 300.0
    timeout: float = 60.0


class Hub:
    """An `HfApi` and the patience for it. `ask` makes one call.

    Args:
        endpoint: base URL; by default HF_ENDPOINT or the public Hub.
        token: by default the one of `hf auth login` or HF_TOKEN. It is never shown.
        patience: how often and how long to try again; by default `Patience()`.
    """

    def __init__(self, endpoint: str | None = None, token: str | None = None, patience: Patience | None = None):
        self.api = HfApi(endpoint=endpoint, token=token, library_name="fusedvlm")
        self.patience = patience or Patience()

    @property
    def token(self) -> str | None:
        """The token in use."""
        return self.api.token or get_token()

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

    def ask(self, about: str, call: Callable[[], Answer]) -> Answer:
        """Make a call until it succeeds or cannot.

        Args:
            about: the repository, for messages.
            call: does the same when called again.

        Raises:
            PushError: one line that names `about`.
        """
        for attempt in range(1, self.patience.attempts + 1):
            try:
                with self.bounded():
                    return call()
            except CALL_ERRORS as error:
                self.wait_or_raise(error, about, attempt)
        raise AssertionError("the last attempt returns or raises")

    def wait_or_raise(self, error: Exception, about: str, attempt: int, transient: bool | None = None) -> None:
        """After attempt number `attempt` failed: wait, or raise the one line when that would not help."""
        if isinstance(error, PushError):
            raise error
        error = unwrap(error)
        transient = is_transient(error) if transient is None else transient
        if not transient or attempt >= self.patience.attempts:
            raise explain(error, about, self.token) from error
        wait = self.wait_after(error, attempt)
        reason = f"status {status_of(error)}" if status_of(error) else type(error).__name__
        say(f"{about}: {reason}; attempt {attempt + 1} of {self.patience.attempts} in {wait:.0f} s")
        time.sleep(wait)

    def wait_after(self, error: Exception, attempt: int) -> float:
        """Seconds until the next attempt: what the Hub asked for, else doubled each time."""
        response = getattr(error, "response", None)
        asked = requested_wait(response.headers) if response is not None else None
        backoff = min(self.patience.first_wait * 2 ** (attempt - 1), self.patience.longest_backoff)
        return backoff if asked is None else min(asked, self.patience.longest_wait)

    def bounded(self) -> "_Bounded":
        """Within this context no connection of huggingface_hub's waits forever: it has no timeout of its own."""
        return _Bounded(self.patience)


class _Bounded:
    """Timeout on huggingface_hub's shared session, and an end to waits that it would sleep through by itself.

    The session belongs to the process, so two threads must not push at once.
    """

    def __init__(self, patience: Patience):
        self.patience = patience

    def __enter__(self) -> None:
        self.session = get_session()
        self.before = self.session.timeout, self.session.event_hooks
        self.session.timeout = self.patience.timeout
        hooks = self.session.event_hooks
        self.session.event_hooks = {**hooks, "response": [*hooks.get("response", []), self.refuse_long_wait]}

    def __exit__(self, *error: Any) -> None:
        self.session.timeout, self.session.event_hooks = self.before

    def refuse_long_wait(self, response) -> None:
        """huggingface_hub sleeps for whatever an answer asks; stop where nobody would want to."""
        if response.status_code not in (429, 503):
            return
        asked = requested_wait(response.headers)
        if asked is not None and asked > self.patience.longest_wait:
            raise LongWait(asked)

"""How often and how long to try again: one policy for every server this package talks to."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

# Answers after which the same request may succeed a little later.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try.

    Args:
        attempts: how often a call is made at most.
        first_wait: seconds before the second attempt; doubled each time.
        longest_backoff: seconds between attempts at most when the server asks for nothing.
        longest_wait: seconds that are waited at most when the server asks for them.
        timeout: seconds without a byte after which a connection counts as dead.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_backoff: float = 30.0
    longest_wait: float = 300.0
    timeout: float = 60.0

    def wait_after(self, attempt: int, asked: float | None) -> float:
        """Seconds until the next attempt: what the server asked for, else doubled each time.

        Args:
            attempt: number of the attempt that failed, from 1.
            asked: seconds from `retry_after`, None when it asked for nothing.
        """
        if asked is not None:
            return min(asked, self.longest_wait)
        return min(self.first_wait * 2 ** (attempt - 1), self.longest_backoff)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait in `Retry-After` (a number or a date), None when it asks for nothing."""
    value = (headers.get("Retry-After") or "").strip()
    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None

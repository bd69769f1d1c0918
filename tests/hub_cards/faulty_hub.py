"""The small Hub with faults: requests that are refused, cut, lost or answered by somebody else.

`server.fault = Fault(number=3, kind="cut_body", at=100)` hits the third request from now on; those in `server.later`
follow one after the other, each counted from the one before. What arrives is recorded.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fusedvlm.hub_double.hub_request import Answer, Problem, Request
from fusedvlm.hub_double.hub_server import Connection, HubServer

PAGE = 7  # rows per page of paginated answers: small, so that clients must follow the links
PART = 50_000  # large files above this size arrive in several parts


class Cut(Exception):
    """Close the connection without another byte."""


class Answered(Exception):
    """Somebody else has answered; the connection stays open."""


@dataclass
class Fault:
    """What goes wrong, and when.

    Args:
        number: which of the coming requests is hit, counted from 1; only those `matching` count.
        kind: "status" answers `at` without doing anything; "drop" closes the connection before reading the body;
            "cut_body" closes it after `at` bytes of the body; "lost_answer" does what was asked, then closes it;
            "cut_answer" closes it after `at` bytes of the answer; "stall" sends nothing for `at` milliseconds, then closes
            it; "kill_*" the same with SIGKILL to `victim`; "html" answers 200 with a page of HTML; "json" with `body`;
            "echo" answers `at` and repeats what `encode` makes of the token it was sent.
        times: how many matching requests in a row are hit.
    """

    number: int
    kind: str
    at: int = 0
    times: int = 1
    headers: dict | None = None
    matching: Callable[[str, str], bool] = lambda method, path: True
    victim: int | None = None
    hits: int = 0
    body: bytes = b"{}"
    encode: Callable[[str], str] = str


class FaultyConnection(Connection):
    """One connection; a fault has four moments to strike."""

    server: "FaultyHub"

    def do(self) -> None:
        """Any request, and what becomes of it."""
        self.fault = self.server.next_fault(self.command, urlsplit(self.path).path)
        self.server.headers_seen.append(f"{self.command} {self.path}\n{self.headers}")
        try:
            super().do()
        except Answered:
            return
        except Cut:
            self.server.calls.append((self.command, self.path, 0))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do

    def read_body(self) -> bytes:
        """The request's body, or its first bytes and then a fault."""
        fault = self.fault
        if fault is not None:
            self.answer_instead(fault)
            self.cut_if("drop")
            if fault.kind.endswith("cut_body"):
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    self.rfile.read(min(fault.at, int(self.headers.get("Content-Length") or 0)))
                self.cut_if("cut_body")
        return super().read_body()

    def answer_instead(self, fault: Fault) -> None:
        """What others say in the Hub's place, or nobody does."""
        if fault.kind == "stall":
            threading.Event().wait(fault.at / 1000)  # tests replace time.sleep
            raise Cut
        if fault.kind not in ("status", "echo", "json", "html"):
            return
        super().read_body()
        if fault.kind == "status":
            raise Problem(fault.at, "Injected", headers=fault.headers)
        if fault.kind == "echo":
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            said = f"you sent {fault.encode(token)} to this gateway".encode("latin-1", "replace").decode("latin-1")
            line = " ".join(said.split())
            raise Problem(fault.at, line, headers={"X-Error-Message": line, "X-HF-Warning": f"proxy; {line}"})
        self.fault = None
        is_json = fault.kind == "json"
        self.send(
            Answer(fault.body) if is_json else Answer(b"<html>gateway</html>", headers={"Content-Type": "text/html"})
        )
        raise Answered

    def cut_if(self, kind: str) -> None:
        """Close the connection, and end the victim, if the fault is of this kind."""
        if self.fault is None or self.fault.kind.removeprefix("kill_") != kind:
            return
        if self.fault.kind.startswith("kill_"):
            os.kill(self.fault.victim, signal.SIGKILL)
        raise Cut

    def reply_to(self, request: Request) -> Answer:
        """What the route says; a refusal can be lost on its way as well."""
        try:
            return super().reply_to(request)
        finally:
            self.cut_if("lost_answer")

    def send(self, answer: Answer) -> None:
        self.server.calls.append((self.command, self.path, answer.status))
        super().send(answer)

    def send_payload(self, payload: bytes) -> None:
        if self.fault is not None and self.fault.kind.endswith("cut_answer"):
            self.wfile.write(payload[: self.fault.at])
            self.wfile.flush()
            self.cut_if("cut_answer")
        super().send_payload(payload)


class FaultyHub(HubServer):
    """A Hub that fails as it is told to, and remembers what it was asked."""

    connection = FaultyConnection
    page_rows = PAGE
    part_bytes = PART

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(folder, port)
        self.fault: Fault | None = None
        self.later: list[Fault] = []
        self.calls: list[tuple[str, str, int]] = []
        self.headers_seen: list[str] = []

    def handle_error(self, request, client_address) -> None:
        """Connections that clients or faults broke are part of the tests; anything else is a bug of the Hub."""
        if not isinstance(sys.exc_info()[1], Cut):
            super().handle_error(request, client_address)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault that hits this request, if any."""
        with self.lock:
            fault = self.fault
            if fault is None or not fault.matching(method, path):
                return None
            fault.number -= 1
            if fault.number > 0:
                return None
            fault.hits += 1
            if fault.hits >= fault.times:
                self.fault = self.later.pop(0) if self.later else None
            return fault

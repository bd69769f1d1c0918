"""The small Hub as a server: connections, tokens, and who answers what.

API on http://127.0.0.1:port, large files on http://localhost:port, so that the client sees two origins as with the real
one; a large-file request that carries a token is refused, so a leaked token is noticed where it leaks. Uploads work
through LFS and through Xet, whose client stores into a folder (`local://`) by itself.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from . import account_routes, collection_routes, history_routes, read_routes, upload_routes
from .hub_request import Answer, Problem, Reply, Request, Route
from .hub_store import Repo, Store

ROUTES = [
    *account_routes.ROUTES,
    *upload_routes.ROUTES,
    *read_routes.ROUTES,
    *history_routes.ROUTES,
    *collection_routes.ROUTES,
]
UNREADABLE = (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError)


def find_route(method: str, url: str) -> tuple[Route, dict[str, str]]:
    """The function that answers, and its arguments. Raises `Problem` where there is none."""
    for wanted, pattern, function in ROUTES:
        match = pattern.fullmatch(url)
        if match and (wanted == method or (wanted == "GET" and method == "HEAD")):
            return function, {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
    raise Problem(404, f"No such page: {method} {url}")


class Connection(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: "HubServer"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do(self) -> None:
        """Any request: read it, run its route, answer."""
        try:
            self.send(self.reply_to(self.read_request()))
        except Problem as problem:
            self.send(problem.answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do

    def read_request(self) -> Request:
        """The whole request. Raises `Problem` for a token that is none, or that should not be here."""
        body = self.read_body()
        authorization = self.headers.get("Authorization", "")
        if self.headers.get("Host", "").startswith("localhost") and authorization:
            raise Problem(400, "A token was sent to the file storage")
        user = self.server.store.user(authorization.removeprefix("Bearer "))
        if authorization and user is None:
            raise Problem(401, "Invalid credentials in Authorization header")
        split = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        return Request(self.server, self.command, split.path, query, self.headers, body, user)

    def read_body(self) -> bytes:
        """The request's body. Raises `ConnectionError` when the client hangs up before its end."""
        try:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                return self._read_chunks()
            return self._read_exactly(int(self.headers.get("Content-Length") or 0))
        except ValueError as error:
            self.close_connection = True
            raise Problem(400, f"The length of the body is unreadable: {error}") from None

    def _read_chunks(self) -> bytes:
        pieces = []
        while size := int(self._read_line().split(b";")[0], 16):
            pieces.append(self._read_exactly(size))
            self._read_line()
        self._read_line()
        return b"".join(pieces)

    def _read_line(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise ConnectionAbortedError("The client hung up")
        return line

    def _read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:  # a commit cut between two lines would be half a commit
            raise ConnectionAbortedError(f"The client hung up after {len(data)} of {size} bytes")
        return data

    def reply_to(self, request: Request) -> Answer:
        """What the route says, one request at a time. Raises `Problem` for whatever it refuses or cannot read."""
        with self.server.lock:
            try:
                function, arguments = find_route(request.method, request.url)
                return _as_answer(function(request, **arguments))
            except UNREADABLE as error:
                raise Problem(400, f"This Hub cannot read the request: {type(error).__name__}: {error}") from error

    def send(self, answer: Answer) -> None:
        """Send an answer: JSON unless it is bytes already."""
        payload = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", "X-Request-Id": "hub-double", **answer.headers}.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.send_payload(b"" if self.command == "HEAD" else payload)

    def send_payload(self, payload: bytes) -> None:
        """Send an answer's body."""
        self.wfile.write(payload)
        self.wfile.flush()


def _as_answer(reply: Reply) -> Answer:
    """The answer, with its JSON written while nobody changes what it tells."""
    answer = reply if isinstance(reply, Answer) else Answer(reply)
    if not isinstance(answer.body, bytes):
        answer.body = json.dumps(answer.body).encode()
    return answer


class HubServer(ThreadingHTTPServer):
    """A Hub that is empty at first and forgets everything at its end.

    `with HubServer(folder) as server:` starts and stops it; `server.endpoint` is the HF_ENDPOINT.

    Args:
        folder: where Xet clients put large files; everything else is kept in memory.
        port: to listen on, on this machine alone; 0 takes a free one. Raises `OSError` for one that is taken.
    """

    daemon_threads = True
    block_on_close = False
    connection: ClassVar[type[Connection]] = Connection
    page_rows = 100  # rows per page of paginated answers
    part_bytes = 50_000_000  # large files above this size arrive in several parts

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), self.connection)
        self.store = Store(folder)
        self.lock = threading.RLock()
        self.on_change: Callable[[Repo], None] = lambda repo: None  # called after whatever somebody could see
        port = self.server_address[1]
        self.endpoint, self.files_origin = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def add_user(self, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """Register a user; returns the token."""
        token = "hf_" + hashlib.sha256(f"{name}{role}".encode()).hexdigest()[:34]
        self.store.tokens[token] = {"name": name, "role": role, "orgs": list(orgs)}
        return token

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to tell; anything else is a bug of this Hub."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

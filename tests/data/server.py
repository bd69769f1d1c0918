"""A chat server of the standard library that can misbehave; `python server.py` is not needed, tests start it."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def chat_server(answer: Callable[[dict, int], object]):
    """Serve `/v1/chat/completions`.

    Args:
        answer: request and how often this very prompt was asked before, to: a text (a good answer), an int (an HTTP
            error), bytes (a body as it is), or None (hang up).

    Yields:
        The address, and the list of requests as (headers, body) that grows.
    """
    seen: list[tuple[dict, dict]] = []
    asked: Counter = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((dict(self.headers), body))
                prompt = json.dumps(body["messages"])
                before = asked[prompt]
                asked[prompt] += 1
            reply = answer(body, before) if self.path == "/v1/chat/completions" else 404
            if reply is None:
                self.close_connection = True
                return
            code = reply if isinstance(reply, int) else 200
            if isinstance(reply, str):
                reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
            content = reply if isinstance(reply, bytes) else f"no, {self.headers.get('Authorization')}".encode()
            self.send_response(code)
            if code == 429:
                self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

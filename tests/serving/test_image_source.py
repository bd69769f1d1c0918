"""Where pictures may come from: https servers of the public network, in time and in bounds."""

import http.server
import io
import socket
import threading
import time

import pytest

from fusedvlm.serving import image_source
from fusedvlm.serving.image_source import ImageLimits, read_image
from fusedvlm.tests import tiny

PRIVATE = ImageLimits(max_bytes=20_000, allow_private=True, timeout=1.0)


class Pages(http.server.BaseHTTPRequestHandler):
    """A server with a picture, and with everything that can go wrong."""

    def do_GET(self):
        name = self.path.strip("/")
        if name in ("loop", "away", "inside"):
            self.send_response(302)
            self.send_header("Location", {"loop": "/loop", "away": "/picture", "inside": "file:///etc/passwd"}[name])
            self.end_headers()
            return
        self.send_response(200 if name in ("picture", "huge", "drip") else 404)
        self.end_headers()
        if name == "picture":
            tiny.picture(1).save(buffer := io.BytesIO(), "PNG")
            self.wfile.write(buffer.getvalue())
        for _ in range({"huge": 10_000, "drip": 100}.get(name, 0)):
            try:
                self.wfile.write(b"x" * (1000 if name == "huge" else 1))
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.1 * (name == "drip"))

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def pages():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_pictures_are_fetched_and_redirections_followed(pages):
    pictures = [read_image(f"{pages}/{name}", PRIVATE) for name in ("picture", "away")]
    tiny.picture(1).save(buffer := io.BytesIO(), "PNG")
    assert [picture.source for picture in pictures] == [buffer.getvalue()] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("loop", "more than 3 redirections"), ("inside", "only https is fetched"),
     ("nowhere", "answered 404"), ("huge", "more than 20,000 bytes"), ("drip", "not there after 1 seconds")],
)  # fmt: skip
def test_what_goes_wrong_is_told_in_time(pages, name, message):
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        read_image(f"{pages}/{name}", PRIVATE)
    assert time.monotonic() - started < 10
    assert len(str(error.value)) <= 300
    assert "root:" not in str(error.value)


@pytest.mark.parametrize("places", [["93.184.216.34", "10.0.0.1"], ["127.0.0.1"], ["fd00::1"], ["169.254.169.254"]])
def test_a_name_with_one_private_address_is_not_asked(monkeypatch, places):
    """Who owns the name chooses which of its addresses is connected to."""
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, **_: [(socket.AF_INET, 1, 6, "", (place, port)) for place in places]
    )
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(ValueError, match="private network"):
        read_image("https://pictures.example/a.png", ImageLimits())


def test_a_redirection_is_looked_at_like_an_address(monkeypatch):
    asked = []

    def fetch(address, limits, until):
        asked.append(address)
        if len(asked) == 1:
            return 302, "https://127.0.0.1/secret", b""
        return original(address, limits, until)

    original = image_source._fetch
    monkeypatch.setattr(image_source, "_fetch", fetch)
    with pytest.raises(ValueError, match="private network"):
        read_image("https://pictures.example/a.png", ImageLimits())
    assert asked[1] == "https://127.0.0.1/secret"


def test_a_server_may_fetch_nothing():
    with pytest.raises(ValueError, match="fetches no pictures"):
        read_image("https://pictures.example/a.png", ImageLimits(allow_urls=False))

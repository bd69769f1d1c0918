"""Pictures that strangers name or send: base64 and https, bounded in bytes, and no address of a private network."""

import base64
import binascii
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from PIL import Image

from .byte_cache import KnownImage, know_image

DATA_URI = re.compile(r"data:(?P<kind>[\w./+-]{0,80})(?:;[\w=.+-]{0,80})*;base64,", re.IGNORECASE)
REDIRECTS = 3
CHUNK = 1 << 16


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may be and where it may come from.

    Args:
        max_bytes: of the file.
        max_pixels: width times height.
        max_images: in one request.
        allow_urls: whether pictures may be named by https address at all.
        allow_private: whether such an address may be one of this machine or of a private network (and plain http).
        timeout: seconds for a whole download.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 16
    allow_urls: bool = True
    allow_private: bool = False
    timeout: float = 10.0


def read_image(address: Any, limits: ImageLimits) -> KnownImage:
    """A picture from a base64 data URI or an https address, whole in memory, not yet decoded.

    Raises:
        ValueError: one line, for what is too large, no address, not reachable or not allowed.
    """
    if not isinstance(address, str) or not address:
        raise ValueError(f"image_url needs a url: a data URI with base64, or an https address; got {address!r:.60}.")
    if address[:5].lower() == "data:":
        return know_image(_decode(address, limits))
    if not re.match(r"https?://", address, re.IGNORECASE):
        raise ValueError(
            f"{address[:60]!r} is neither a data URI nor an https address; files of the server cannot be named."
        )
    if not limits.allow_urls:
        raise ValueError("This server fetches no pictures; send them as data URIs with base64.")
    return know_image(_download(address, limits))


def check_pixels(data: bytes, limits: ImageLimits) -> None:
    """Refuse a picture of too many pixels before it is decoded; what is none, its decoder refuses."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
    except Exception:  # noqa: BLE001 - the reader of pictures says what is wrong, in one line
        return
    if width * height > limits.max_pixels:
        raise ValueError(f"A picture has {width} x {height} pixels; at most {limits.max_pixels:,} are taken.")


def _decode(address: str, limits: ImageLimits) -> bytes:
    head = DATA_URI.match(address[:400])
    if head is None:
        raise ValueError(f"{address[:40]!r}... is no data URI with base64: write data:image/png;base64,...")
    length = len(address) - head.end()
    if length * 3 // 4 > limits.max_bytes + 3:
        raise ValueError(f"A picture has about {length * 3 // 4:,} bytes; at most {limits.max_bytes:,} are taken.")
    try:
        return base64.b64decode(address[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"A picture's base64 cannot be read: {error}.") from None


def _download(address: str, limits: ImageLimits) -> bytes:
    shown, until = address[:100], time.monotonic() + limits.timeout
    try:
        for _ in range(REDIRECTS + 1):
            status, target, body = _fetch(address, limits, until)
            if target is None:
                break
            address = urljoin(address, target)
        else:
            raise ValueError(f"{shown}: more than {REDIRECTS} redirections.")
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{shown}: cannot be fetched ({reason}).") from None
    if status != http.client.OK:
        raise ValueError(f"{shown}: the server answered {status}.")
    return body


def _fetch(address: str, limits: ImageLimits, until: float) -> tuple[int, str | None, bytes]:
    """(status, where to go on, body) of one request, to an address that was looked at before it was connected to."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"{address[:100]}: no address ({error}).") from None
    allowed = ("https", "http") if limits.allow_private else ("https",)
    if parts.scheme.lower() not in allowed or not host:
        raise ValueError(f"{address[:100]}: only https is fetched, from a named server.")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{parts.scheme}://...@{host[:60]}: addresses with passwords are not fetched.")
    is_tls = parts.scheme.lower() == "https"
    port = port or (443 if is_tls else 80)
    place = _public_address(host, port, limits)
    left = max(0.1, until - time.monotonic())
    connection = http.client.HTTPConnection(host, port, timeout=left)
    raw = socket.create_connection(place, timeout=left)
    try:
        # Certificates are checked against the name; the connection goes to the address that was looked at.
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if is_tls else raw
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "fusedvlm", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and answer.getheader("Location"):
            return answer.status, answer.getheader("Location"), b""
        return answer.status, None, _read_bounded(answer, limits, until, address)
    finally:
        connection.close()
        raw.close()


def _read_bounded(answer: Any, limits: ImageLimits, until: float, address: str) -> bytes:
    body = bytearray()
    while chunk := answer.read1(CHUNK):
        body += chunk
        if len(body) > limits.max_bytes:
            raise ValueError(f"{address[:100]}: more than {limits.max_bytes:,} bytes.")
        if time.monotonic() > until:
            raise ValueError(f"{address[:100]}: not there after {limits.timeout:g} seconds.")
    return bytes(body)


def _public_address(host: str, port: int, limits: ImageLimits) -> tuple[str, int]:
    """An address of the host that may be asked: all of its addresses have to be public, or somebody could choose."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for place in places:
        mapped = getattr(place, "ipv4_mapped", None) or place
        if not limits.allow_private and (not mapped.is_global or mapped.is_multicast):
            raise ValueError(f"{host[:80]} is an address of a private network, which this server does not fetch from.")
    return str(places[0]), port

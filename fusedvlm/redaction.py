"""Text from elsewhere without the user's secrets: servers and proxies repeat what they were sent, in any encoding."""

import base64
import binascii
import codecs
import html
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import unquote

MASK = "***"
LEFT_OUT = "(left out: it repeats a token)"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
SHORTEST_SECRET = 8
WINDOW = 10  # characters of a secret in a row that give it away
LONGEST_TEXT = 20_000  # characters that are looked at; what a message needs is at its beginning
LONGEST_WORD = 40  # letters and digits in a row; commits have 40
LOOKS_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_|api_org_|gh[pousr]_|github_pat_|sk-|xox[abprs]-|AKIA)[A-Za-z0-9_-]{8,}"
    r"|(?i:\b(?:bearer|basic)\s+[^\s\"',;]{8,})"
)
USER_IN_URL = re.compile(r"(\w+://)[^/\s@]+@")
ESCAPES = re.compile(r"\\\\?u([0-9A-Fa-f]{4})|\\\\?x([0-9A-Fa-f]{2})|\\\\?([0-7]{3})")
# Code points as they may be written in a row, and the base of each.
NUMBERS = ((r"\d+", 10), (r"\b[0-7]{2,3}\b", 8), (r"(?:0x|\\x|\b)([0-9A-Fa-f]{2})\b", 16), (r"\b[01]{7,8}\b", 2))
DENSE = re.compile(rf"[A-Za-z0-9+]{{{LONGEST_WORD + 1},}}={{0,2}}")


def known_secrets() -> list[str]:
    """The Hub token in use and every variable of the environment whose name says that it is secret."""
    from huggingface_hub import get_token

    variables = os.environ.items()
    found = [value for name, value in variables if SECRET_NAME.search(name) and not name.startswith("TOKENIZERS_")]
    found.append(get_token() or "")
    return list(dict.fromkeys(value.strip() for value in found if len(value.strip()) >= SHORTEST_SECRET))


def redact(text: object, secrets: Iterable[str] = ()) -> str:
    """Text without anything that is, holds or encodes a secret.

    Words that do so become `***`; a text that spells one out over several words is left out as a whole. Encodings that
    are seen: any case, reversed, rot13, percent, HTML, backslash and quoted-printable escapes, base16/32/64/85, code
    points as numbers, and two of these on top of each other. Words longer than any commit are masked in any case.

    Args:
        text: what was said.
        secrets: values to look for, besides what looks like a token.
    """
    text = str(text)[:LONGEST_TEXT]
    windows = _windows(secrets)
    text = USER_IN_URL.sub(rf"\1{MASK}@", text)
    text = LOOKS_SECRET.sub(MASK, text)
    if windows:
        text = re.sub(r"\S{8,}", lambda match: MASK if _gives_away(match.group(), windows) else match.group(), text)
        if any(_holds(spelling, windows) for spelling in _spelled(text)):
            return LEFT_OUT
    return DENSE.sub(MASK, text)


def redacted_traceback(error: BaseException, secrets: Iterable[str] = ()) -> str:
    """A traceback as Python prints it, with every exception's own words redacted."""
    secrets, parts = list(secrets), []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        error = cause
        seen.add(id(error))
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(error).__name__}: {redact(error, secrets)}\n")
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nwhich led to:\n\n".join(reversed(parts))


def _windows(secrets: Iterable[str]) -> list[str]:
    """Pieces of the secrets that must not be seen, in lower case."""
    pieces: dict[str, None] = {}
    for secret in secrets:
        secret = secret.strip().lower().removeprefix("hf_")
        size = min(WINDOW, len(secret))
        if size >= SHORTEST_SECRET - 3:
            pieces |= dict.fromkeys(secret[start : start + size] for start in range(len(secret) - size + 1))
    return list(pieces)


def _holds(text: str, windows: list[str]) -> bool:
    text = text.lower()
    return any(window in text for window in windows)


def _gives_away(word: str, windows: list[str]) -> bool:
    """Whether a word or something decoded from it holds a piece of a secret; two encodings deep."""
    waiting, seen = [(word, 0)], {word}
    while waiting:
        current, depth = waiting.pop()
        if _holds(current, windows) or _holds(current[::-1], windows) or _holds(_letters(current), windows):
            return True
        for decoded in _decoded(current) if depth < 2 else ():
            if decoded not in seen and len(decoded) >= 4:
                seen.add(decoded)
                waiting.append((decoded, depth + 1))
    return False


def _letters(text: str) -> str:
    """Letters and digits alone."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def _decoded(word: str) -> Iterator[str]:
    """What a word may stand for."""
    yield unquote(word)
    yield html.unescape(word)
    yield codecs.encode(word, "rot13")
    for decode in (_backslashes, _quoted_printable, _hex):
        yield from _tried(decode, word)
    dense = re.sub(r"[^A-Za-z0-9+/_-]", "", word).replace("-", "+").replace("_", "/")
    for start in range(4):
        piece = dense[start : start + (len(dense) - start) // 4 * 4]
        yield from _tried(base64.b64decode, piece)
        yield from _tried(base64.b64decode, dense[start:] + "=" * (-len(dense[start:]) % 4))
    upper = re.sub(r"[^A-Z2-7]", "", word.upper())
    for start in range(8):
        yield from _tried(base64.b32decode, upper[start : start + (len(upper) - start) // 8 * 8])
    yield from _tried(base64.b85decode, word)
    yield from _tried(base64.a85decode, word.removeprefix("<~").removesuffix("~>"))


def _tried(decode: Callable[[str], bytes], word: str) -> Iterator[str]:
    try:
        yield decode(word).decode("latin-1")
    except (ValueError, binascii.Error):
        return


def _backslashes(word: str) -> bytes:
    def character(match: re.Match) -> str:
        by_hex, by_octal = match.group(1) or match.group(2), match.group(3)
        return chr(int(by_hex, 16) if by_hex else int(by_octal, 8))

    return ESCAPES.sub(character, word).encode("latin-1", "replace")


def _quoted_printable(word: str) -> bytes:
    return binascii.a2b_qp(word.encode())


def _hex(word: str) -> bytes:
    digits = re.sub(r"0x|[^0-9A-Fa-f]", "", word)
    return bytes.fromhex(digits[: len(digits) // 2 * 2])


def _spelled(text: str) -> Iterator[str]:
    """What the whole text says when its spaces, or the numbers in it, are read as one word."""
    squeezed = _letters(text)
    yield squeezed
    yield squeezed[::-1]
    for pattern, base in NUMBERS:
        codes = (int(number, base) for number in re.findall(pattern, text))
        yield "".join(chr(code) for code in codes if 32 <= code < 127)
    joined = "".join(text.split())
    if len(joined) < 2000:
        yield from _decoded(joined)

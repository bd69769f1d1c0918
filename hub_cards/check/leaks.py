"""What must not be in a public repository: pickles, secrets, folders of a user's machine."""

import contextlib
import json
import pickletools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector

PICKLE_SUFFIXES = {
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5", ".dill", ".msgpack", ".pyc",
}  # fmt: skip
LARGEST_TEXT = 50_000_000
# Secrets that detect-secrets has no detector for.
SECRETS = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{32,}"),
}
# Its detectors that look for the form of one vendor's secret. Those that go by entropy, keywords or short prefixes
# would take checksums and vocabulary entries for secrets.
DETECTORS = (
    AWSKeyDetector, AzureStorageKeyDetector, DiscordBotTokenDetector, GitHubTokenDetector, GitLabTokenDetector,
    JwtTokenDetector, MailchimpDetector, NpmDetector, OpenAIDetector, PrivateKeyDetector, PypiTokenDetector,
    SendGridDetector, SlackDetector, SquareOAuthDetector, StripeDetector, TelegramBotTokenDetector,
)  # fmt: skip
# Two parts at least, so that "/" and "</s>" are not paths; a word, ":" or "/" in front makes it part of something else.
PATH = re.compile(
    r"(?<![\w.:/<~-])(?:/(?:home|root|Users|tmp|mnt|data|var|opt|work|scratch|workspace|srv|media|gpfs|lustre|content|kaggle)"
    r"/[\w.+@-]+[\w.+@/-]*|~/[\w.+@-]+[\w.+@/-]*|[A-Za-z]:\\\\?[\w.+@ -]+\\[\w.+@ \\-]+|file://[\w./+@-]+)"
)
WHOLE_PATH = re.compile(r"/[\w.+@-]+(/[\w.+@ -]+)+/?")


def looks_like_pickle(path: Path) -> str | None:
    """What kind of pickle a file is, under whatever name; None for other files."""
    if path.suffix in PICKLE_SUFFIXES:
        return f"a {path.suffix} file may be a pickle"
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        return "is a zip archive, as torch.save writes them"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")) or head[:4] == b"\x28\xb5\x2f\xfd":
        return "is a compressed archive"
    if re.match(rb"\x80[\x02-\x06]", head) and path.suffix != ".safetensors":
        return "is a pickle"
    # The first eight bytes of safetensors are the length of a header that begins with a brace.
    if path.suffix == ".safetensors":
        return "is a pickle" if head[:1] == b"\x80" and head[8:9] != b"{" else None
    if path.stat().st_size <= LARGEST_TEXT and _is_old_pickle(path.read_bytes()):
        return "is a pickle"
    return None


def _is_old_pickle(data: bytes) -> bool:
    """Protocols 0 and 1 have no magic number: a pickle is what reads as one to its last byte."""
    try:
        operations = list(pickletools.genops(data))
    except (ValueError, IndexError, KeyError, UnicodeError, OverflowError, struct.error):
        return False
    return len(operations) > 1 and (operations[-1][2] or 0) + 1 == len(data.rstrip(b"\n"))


def _searchable(path: Path) -> bytes:
    """All of a file; of a weight file the header, its tensors are numbers (nothing when it is damaged)."""
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return file.read()
        length = int.from_bytes(file.read(8), "little")
        return file.read(length) if length <= min(path.stat().st_size, LARGEST_TEXT) else b""


def secrets_in(path: Path) -> Iterator[str]:
    """Kinds of secrets in a file, never the secrets themselves."""
    text = _searchable(path).decode("utf-8", errors="replace")
    yield from (what for what, pattern in SECRETS.items() if pattern.search(text))
    for detector in DETECTORS:
        if any(True for _ in detector().analyze_string(text)):
            yield f"a secret ({detector.secret_type})"


def paths_in(path: Path) -> Iterator[str]:
    """Absolute paths that a file names."""
    text = _searchable(path).decode("utf-8", errors="replace")
    found = dict.fromkeys(match.group() for match in PATH.finditer(text))
    if path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):  # damaged JSON is reported elsewhere
            found |= dict.fromkeys(value for value in _strings(json.loads(text)) if WHOLE_PATH.fullmatch(value))
    return iter(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)

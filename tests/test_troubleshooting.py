"""Every message that docs/troubleshooting.md explains is one that this package really prints."""

import re
from pathlib import Path

import pytest

import fusedvlm

ROOT = Path(fusedvlm.__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
if not PAGE.exists():
    pytest.skip("docs are not part of an installed package", allow_module_level=True)
FOREIGN = ("Your setup doesn't support", "CUDA out of memory", "The repository")  # transformers' and torch's
MESSAGES = [
    message
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("`")
    for message in re.findall(r"`([^`]+)`", line)
    if not message.startswith(FOREIGN)
]


@pytest.fixture(scope="module")
def said():
    """All library sources, texts that are split over lines joined and what is filled in left out."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in ("tests", "build", "benchmarks")]
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        if not folder.name.startswith(".")
        for path in folder.rglob("*.py")
    )
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", sources)
    return re.sub(r"\{[^{}]*\}", "\0", joined)


def fragments(message: str) -> list[str]:
    """What of a message is the same every time."""
    message = re.sub(r"'[^']*'|=\S+|\d+|question \d|\.\.\.", "\0", message)
    return [part.strip(" .:;") for part in message.split("\0") if len(part.strip(" .:;")) > 5]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_ours(message, said):
    missing = [part for part in fragments(message) if part not in said]
    assert not missing, f"nothing says {missing}"


def test_there_are_twenty_and_they_are_tried():
    assert len(MESSAGES) >= 20
    assert all(fragments(message) for message in MESSAGES)

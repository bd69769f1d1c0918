"""The chat page on this machine: the Space's app beside a settings file that names the variant where it lies."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from fusedvlm.console import say
from fusedvlm.hub_cards.card.render_card import TEMPLATES

from .space import QUESTION, QUESTIONS

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def demo_settings(model: str, revision: str | None, pictures: list[Path]) -> dict:
    """What the app reads: where the variant is, and what is offered to ask.

    Raises:
        ValueError: for a picture that is not there, or a revision of a folder.
    """
    folder = Path(model)
    if folder.is_dir() and revision is not None:
        raise ValueError(f"{model} is a folder; --revision is for repositories.")
    for picture in pictures:
        if not picture.is_file():
            raise ValueError(f"{picture}: no such picture.")
    if folder.is_dir() and not pictures:
        beside = [folder, folder.resolve().parent]
        pictures = [path for place in beside for path in sorted(place.iterdir()) if path.suffix.lower() in PICTURES][:4]
    return {
        "model": str(folder.resolve()) if folder.is_dir() else model,
        "revision": revision,
        "title": f"FusedVLM: {folder.resolve().name if folder.is_dir() else model}",
        "question": QUESTION,
        "questions": list(QUESTIONS),
        "pictures": [str(path.resolve()) for path in pictures],
    }


def run_demo(model: str, revision: str | None, host: str, port: int, pictures: list[Path]) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ValueError: without gradio, for a port that is taken, and when the page ends by itself.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("fusedvlm demo needs gradio: pip install 'fusedvlm[space]'")
    settings = demo_settings(model, revision, pictures)
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port} cannot be listened on: {error.strerror or error}.") from None
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="fusedvlm-demo-") as folder:
        app = Path(folder) / "app.py"
        app.write_bytes((TEMPLATES / "space_app.py").read_bytes())
        (Path(folder) / "space.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        environment = {
            **os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": host,
            "GRADIO_ANALYTICS_ENABLED": os.environ.get("GRADIO_ANALYTICS_ENABLED", "False"),
        }  # fmt: skip
        say(f"fusedvlm demo: {settings['title']} on http://{host}:{port} once the model is loaded; Ctrl-C ends it.")
        page = subprocess.Popen([sys.executable, str(app)], env=environment)
        try:
            code = page.wait()
        except KeyboardInterrupt:
            page.wait(10)
            return
        finally:
            if page.poll() is None:
                page.terminate()
    if code != 0:
        raise ValueError(f"The page ended with exit code {code}; what it said stands above.")

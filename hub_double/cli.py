"""`fusedvlm hub-double`."""

import errno
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fusedvlm.console import say, show
from fusedvlm.files import write_atomically

from .hub_server import HubServer

USER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
FIRST_WORDS = "export HF_ENDPOINT=http://127.0.0.1:"  # a file that begins otherwise is not ours
HERE = "127.0.0.1,localhost"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Stopped(Exception):
    """Somebody ended the Hub."""


def hub_double(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 0,
    user: Annotated[str, typer.Option(help="Name of the user who may write: the namespace to push to.")] = "ada",
    env: Annotated[
        Path | None,
        typer.Option(help="File for the two variables; standard output by default. It is there as long as the Hub is."),
    ] = None,
) -> None:
    """Run a small Hub on this machine to try publishing on: it keeps what it is sent until it ends.

    It answers what pushing, checking and loading models asks of a Hub. No other machine can reach it. While HF_ENDPOINT
    names it nothing goes to the real Hub, and nothing comes from there: a language model that a variant names by its id
    on the real Hub is not here.

    Start it in one terminal; in another one, source hub.env and push. Ctrl-C ends it; unset HF_ENDPOINT HF_TOKEN brings
    the real Hub back.

    Example: fusedvlm hub-double --env hub.env
    """
    if not USER.fullmatch(user):
        raise ValueError(
            f"--user={user!r} is no name on the Hub: letters and digits, joined by single '-', '_' or '.'."
        )
    if env is not None:
        _require_ours(env)
    try:
        with _stopped_by_signals(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            _serve(Path(folder), port, user, env)
    except _Stopped:
        say("The Hub has ended; what it was sent is gone. Back to the real one: unset HF_ENDPOINT HF_TOKEN")


def _serve(folder: Path, port: int, user: str, env: Path | None) -> NoReturn:
    """Serve until an exception; the file is there just as long as the Hub is."""
    with _listening(folder, port) as server:
        lines = variables(server.endpoint, server.add_user(user), os.environ)
        try:
            if env is None:
                show(lines.rstrip("\n"))
            else:
                write_atomically(env, lines)
            use = "the lines above" if env is None else f"source {env}"
            say(f"A Hub on this machine: {server.endpoint}, user {user}. In another terminal: {use}. Ctrl-C ends it.")
            while True:
                time.sleep(3600)
        finally:
            if env is not None and env.is_file() and env.read_text(encoding="utf-8", errors="replace") == lines:
                env.unlink()


def variables(endpoint: str, token: str, environment: Mapping[str, str]) -> str:
    """Shell lines that send huggingface_hub to a Hub on this machine, past a proxy where there is one.

    >>> variables("http://127.0.0.1:5000", "hf_x", {})
    'export HF_ENDPOINT=http://127.0.0.1:5000\\nexport HF_TOKEN=hf_x\\n'
    """
    lines = [f"export HF_ENDPOINT={endpoint}", f"export HF_TOKEN={token}"]
    if any(environment.get(name) or environment.get(name.upper()) for name in ("http_proxy", "all_proxy")):
        lines += [f'export {name}="{HERE}${{{name}:+,${name}}}"' for name in ("no_proxy", "NO_PROXY")]
    return "".join(f"{line}\n" for line in lines)


def _listening(folder: Path, port: int) -> HubServer:
    try:
        return HubServer(folder, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(
            f"--port={port}: {(error.strerror or '').lower()}; without --port a free one is taken."
        ) from None


def _require_ours(env: Path) -> None:
    """Raises `ValueError` for a file that this command did not write: somebody may need what is in it."""
    if env.is_dir():
        raise ValueError(f"--env={env} is a folder; name a file.")
    if env.exists() and not env.read_text(encoding="utf-8", errors="replace").startswith(FIRST_WORDS):
        raise ValueError(f"--env={env} is there already and is not of an earlier Hub; name another file.")


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """The first signal raises `_Stopped` in the main thread; later ones do not disturb what that cleans up."""

    def stop(number: int, frame: Any) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise _Stopped

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        # What scripts start in the background begins with SIGINT ignored; nohup ignores SIGHUP, and means it.
        if number == signal.SIGINT or before[number] is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

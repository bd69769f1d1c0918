"""Python interpreters for tests, forked from one that has imported torch: a fifth of the CPU time of a fresh one.

`executable("python")` and `executable("fusedvlm")` are stand-ins for these commands. A stand-in sends its arguments, environment,
folder and standard streams to the one server of a test run, which forks; it ends as the fork ends, and the fork is killed
when it is. What the server has imported is third-party and reads none of the variables that tests set: transformers,
huggingface_hub and this package are imported in the fork, or are not. Tests of what a command imports, of memory and of
the installed command itself start a real interpreter, `sys.executable`. Whatever the server cannot do (an option of
Python that is not known here, another PYTHONPATH, a system without fork) the real interpreter does.

This file imports nothing but the standard library: the stand-ins have to start at once.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

SOCKET = "FUSEDVLM_TEST_FORK_SERVER"  # where the server listens; xdist's workers and whatever they start inherit it
SETTINGS = ("PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS", "PYTHONHASHSEED", "PYTHONSTARTUP")
IMPORTED = (
    "numpy", "PIL.Image", "yaml", "jinja2", "tqdm", "regex", "psutil", "pydantic", "sympy", "scipy.optimize",
    "scipy.stats", "pandas", "pyarrow", "tokenizers", "safetensors.torch", "httpx", "torch._dynamo", "torchvision",
)  # fmt: skip
STAND_IN = """#!{real} -IS
import sys
sys.path.append({folder!r})
from fork_server import stand_in
stand_in({real!r}, {address!r}, {settings!r}, {command!r})
"""


# -- the test run ------------------------------------------------------------------------------------------------------


def executable(command: str = "python") -> str:
    """Path of a stand-in, or of the command itself where no server runs."""
    folder = os.path.dirname(os.environ[SOCKET]) if SOCKET in os.environ else os.path.dirname(sys.executable)
    return os.path.join(folder, command)


class Server:
    """Starts the server of a test run, in a folder with the stand-ins, and ends it."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fusedvlm-fork-")
        address = str(Path(self.folder.name) / "socket")
        for command in ("python", "fusedvlm"):
            path = Path(self.folder.name) / command
            settings = {name: os.environ.get(name) for name in SETTINGS}
            text = STAND_IN.format(
                real=sys.executable,
                folder=os.path.dirname(__file__),
                address=address,
                settings=settings,
                command=command,
            )
            path.write_text(text)
            path.chmod(0o755)
        command = [sys.executable, __file__, address, str(os.getpid())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.environ[SOCKET] = address

    def stop(self) -> None:
        """End the server and wait, so that its CPU time counts as the test run's."""
        self.process.terminate()
        self.process.wait()
        os.environ.pop(SOCKET, None)
        self.folder.cleanup()


# -- a stand-in --------------------------------------------------------------------------------------------------------


def stand_in(real: str, address: str, settings: dict[str, str | None], command: str) -> None:
    """Run what the real interpreter would run with these arguments; never returns."""
    arguments = sys.argv[1:]
    ours = [real, *arguments] if command == "python" else [str(Path(real).with_name(command)), *arguments]
    work = wanted(arguments) if command == "python" else ("fusedvlm", "", arguments)
    if work is None or any(os.environ.get(name) != value for name, value in settings.items()):
        os.execv(ours[0], ours)
    request = {
        "work": work,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "executable": os.path.join(os.path.dirname(address), "python"),
    }
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        os.execv(ours[0], ours)
    message = json.dumps(request).encode()
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([struct.pack("!Q", len(message))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(message)
    status = connection.recv(4)
    if len(status) < 4:
        sys.exit("The server of forked interpreters ended.")
    (code,) = struct.unpack("!i", status)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def wanted(arguments: list[str]) -> tuple[str, str, list[str]] | None:
    """What to run: how, what, and `sys.argv[1:]`; None when the real interpreter has to decide."""
    rest = list(arguments)
    while rest and rest[0] in ("-u", "-B"):
        rest.pop(0)
    if len(rest) >= 2 and rest[0] in ("-c", "-m"):
        return rest[0], rest[1], rest[2:]
    if rest and rest[0] == "-":
        return "-", "", rest[1:]
    if rest and rest[0].endswith(".py"):
        return "script", rest[0], rest[1:]
    return None


# -- the server --------------------------------------------------------------------------------------------------------


def serve(address: str, parent: int) -> dict:
    """Fork for every request; returns it, in the fork. Ends with the test run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    awake, wake = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running: dict[int, socket.socket] = {}
    while os.getppid() == parent:
        ready, _, _ = select.select([listener, awake, *(c for c in running.values() if c.fileno() >= 0)], [], [], 1.0)
        if awake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(awake, 4096)
            reap(running)
        for pid, connection in running.items():
            if connection in ready:  # nothing but its end comes
                os.kill(pid, signal.SIGKILL)
                connection.close()
        if listener in ready:
            connection, _ = listener.accept()
            if (request := receive(connection)) is None:
                continue
            import_all()
            if pid := os.fork():
                running[pid] = connection
                for stream in request["streams"]:
                    os.close(stream)
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (listener, connection, *running.values()):
                other.close()
            os.close(awake)
            os.close(wake)
            return request
    os._exit(0)  # not the end of a program: nothing to clean up, nothing to say


def reap(running: dict[int, socket.socket]) -> None:
    """Tell the stand-ins of forks that ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = running.pop(pid)
        if connection.fileno() >= 0:
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            connection.close()


def receive(connection: socket.socket) -> dict | None:
    """A stand-in's request with its standard streams, or None when it is gone already."""
    space = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    header, control, _, _ = connection.recvmsg(8, space)
    streams = array.array("i")
    for _, _, content in control:
        streams.frombytes(content)
    if len(header) < 8:
        return None
    (missing,), parts = struct.unpack("!Q", header), []
    while missing and (part := connection.recv(missing)):
        parts.append(part)
        missing -= len(part)
    return None if missing else {**json.loads(b"".join(parts)), "streams": list(streams)}


def import_all() -> None:
    """Import once what nearly every fork needs, if it is installed."""
    if "torch" in sys.modules:
        return
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks share these objects' pages as long as nobody visits them


def become(request: dict) -> None:
    """Be the interpreter that was asked for."""
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(number, mode, closefd=False, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        setattr(sys, name, stream)
    sys.stdout.reconfigure(write_through=bool(request["environment"].get("PYTHONUNBUFFERED")))
    sys.stderr.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.executable = request["executable"]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    code = 1
    try:
        code = exit_code(*request["work"])
        threading._shutdown()  # as an interpreter does: wait for threads, then what was registered
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # taking the modules down would copy every page that is shared with the server


def exit_code(kind: str, what: str, arguments: list[str]) -> int:
    """Run a program to its end, however it ends."""
    try:
        run(kind, what, arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:  # noqa: BLE001 - what an interpreter does with any exception
        traceback.print_exc()
        return 1
    return 0


def run(kind: str, what: str, arguments: list[str]) -> None:
    """Run a program as `__main__`."""
    import runpy

    first = {"-c": "-c", "-": "-", "fusedvlm": str(Path(sys.executable).with_name("fusedvlm"))}
    sys.argv = [first.get(kind, what), *arguments]
    sys.path.insert(0, {"-m": os.getcwd(), "script": os.path.dirname(os.path.abspath(what))}.get(kind, ""))
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "script":
        runpy.run_path(what, run_name="__main__")
    else:
        code = (
            "import sys\nfrom fusedvlm.cli import main\nsys.exit(main())"
            if kind == "fusedvlm"
            else what or sys.stdin.read()
        )
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<stdin>" if kind == "-" else "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which no interpreter has
    become(serve(sys.argv[1], int(sys.argv[2])))

"""The process that runs a repository's code finds no secret, no network and no home, and cannot take the machine down."""

import ast
import base64
import json
import os
import socket

import pytest

from fusedvlm.hub_cards.check import sandbox
from fusedvlm.hub_cards.check.isolated_loading import environment, load_isolated
from fusedvlm.hub_cards.check.repository_check import check_and_load
from fusedvlm.tests.hub_cards.test_attacks import reforge

SECRET = "hf_" + "a1B2" * 9
# Run while the variant is loaded; each tries something and stops with what came of it.
SPY = """
import base64, ctypes, json, os, socket, sys
given = json.loads(base64.b64decode("{given}"))
found = {{}}

def attempt(name, act):
    try:
        found[name] = repr(act())[:60]
    except BaseException as error:
        found[name] = type(error).__name__

def by_the_system():
    system = ctypes.CDLL(None)
    return system.open(given["secret"].encode(), 0)

def connect():
    system = ctypes.CDLL(None)
    plug = system.socket(2, 1, 0)
    address = (2).to_bytes(2, "little") + given["port"].to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
    return system.connect(plug, address, 16)

attempt("variables", lambda: sorted(name for name, value in os.environ.items() if given["token"] in value))
attempt("home", lambda: os.path.expanduser("~") == given["home"])
attempt("token", lambda: open(given["secret"]).read())
attempt("token by the system", by_the_system)
attempt("parent", lambda: open(f"/proc/{{os.getppid()}}/environ").read())
attempt("network", lambda: socket.create_connection(("127.0.0.1", given["port"]), 2))
attempt("network by the system", connect)
attempt("another process", lambda: os.system("true"))
attempt("writing", lambda: open(given["written"], "w"))
raise RuntimeError("SPY " + repr(found))
"""


@pytest.fixture
def folder(tiny_release, tmp_path):
    tiny_release.write(tmp_path / "repository")
    return tmp_path / "repository"


def add_code(folder, code):
    path = folder / "configuration_fusedvlm.py"
    path.write_text(path.read_text() + "\n" + code + "\n")
    reforge(folder)


def test_a_spy_finds_nothing(folder, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    secret = home / ".cache" / "huggingface" / "token"
    secret.write_text(SECRET)
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "SOMETHING"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", str(home))
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {
            "secret": str(secret), "port": server.getsockname()[1], "token": SECRET, "home": str(home),
            "written": str(tmp_path / "written"),
        }  # fmt: skip
        add_code(folder, SPY.format(given=base64.b64encode(json.dumps(values).encode()).decode()))
        problems, loaded = check_and_load(folder, run_foreign_code=True)
    said = problems[-1].message
    assert "SPY" in said, problems
    assert SECRET not in said
    found = ast.literal_eval(said.partition("SPY ")[2])
    assert found["variables"] == "[]"
    assert found["home"] == "False"
    assert found["token"] == found["parent"] == found["another process"] == found["writing"] == "PermissionError"
    assert found["network"] == "PermissionError"
    if "Landlock" in loaded.isolation["files"]:
        assert found["token by the system"] == "-1"
    if "a network of its own" in loaded.isolation["network"]:
        assert found["network by the system"] == "-1"
    assert not (tmp_path / "written").exists()


def test_a_sound_variant_loads_and_says_what_it_was_kept_from(folder):
    problems, loaded = check_and_load(folder)
    assert problems == []
    assert loaded.problem is None
    assert set(loaded.isolation) == {"network", "files", "limits"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os._exit(0)", "stopped without an answer (exit code 0)"),
        ("import time; time.sleep(600)", "within 15 seconds"),
        ("raise RuntimeError('not \\x1b[2J today')", "RuntimeError: not \\x1b[2J today"),
        ("open('large', 'wb').write(bytes(200_000_000))", "File too large"),
    ],
)
def test_code_that_misbehaves_is_one_line(folder, code, message):
    path = folder / "configuration_fusedvlm.py"
    path.write_text(path.read_text() + "\n" + code + "\n")
    loaded = load_isolated(folder, timeout=15 if "sleep" in code else 120)
    assert message in loaded.problem
    assert loaded.problem.isprintable()


def test_the_environment_holds_nothing_of_the_caller_s(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib")
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "HTTPS_PROXY", "PYTHONPATH", "USER"):
        monkeypatch.setenv(name, SECRET)
    variables = environment(tmp_path)
    assert SECRET not in "".join(variables.values())
    assert variables["LD_LIBRARY_PATH"] == "/lib"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert all(variables[name].startswith(str(tmp_path)) for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME"))


def test_where_the_system_refuses_python_still_does(tmp_path):
    """Landlock and namespaces missing: the guards inside Python hold by themselves. In a process of its own."""
    import subprocess
    import sys

    (tmp_path / "private").write_text("x")
    script = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(sandbox.__file__)!r})
import sandbox
sandbox._leave_namespaces = lambda: False
sandbox._landlock = lambda *paths: False
held = sandbox.lock([sys.prefix, sys.base_prefix], [], {{"RLIMIT_CORE": 0}})
assert held["network"] == "sockets refused by Python", held
assert "refused by Python" in held["files"], held
import socket
for act in (lambda: open({str(tmp_path / "private")!r}), lambda: os.listdir({str(tmp_path)!r}), lambda: os.system("true"),
            lambda: socket.create_connection(("127.0.0.1", 9)), lambda: open(f"/proc/{{os.getppid()}}/environ")):
    try:
        act()
    except PermissionError:
        continue
    raise AssertionError("allowed")
open(os.__file__).close()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

"""A command loads what it needs and no more; how long that takes is in benchmarks/startup.py."""

import ast
import json
import subprocess
import sys

import pytest
import typer

from fusedvlm.cli import COMMANDS, load_command
from fusedvlm.tests.test_layout import FILES

MOST_LATE_IMPORTS = 60
HEAVY = ["torch", "torchvision", "transformers", "datasets", "matplotlib", "trl", "peft", "open_clip"]
WITH_SCIPY = ["scaling", "plan"]  # their fits are what they are for
LIGHT = [
    ["--help"],
    ["--version"],
    *[[name, "--help"] for name in COMMANDS],
    ["train", "recipes"],
    ["data", "check", "--help"],
    ["scaling", "fit", "paper"],
    ["scaling", "optimal", "--text-tokens", "50"],
]
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from fusedvlm.cli import app
loaded = {}
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output)
    loaded[" ".join(words)] = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
print(json.dumps(loaded))
"""


def test_light_commands_import_nothing_heavy():
    command = [sys.executable, "-c", SCRIPT, json.dumps(LIGHT), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert len(loaded) == len(LIGHT)
    assert {words: names for words, names in loaded.items() if names} == {}


def test_the_facade_and_its_help_import_no_numbers():
    script = "import sys, fusedvlm.cli; print([m for m in ('numpy', 'scipy', 'pydantic', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_help_is_what_the_command_says_of_itself(name):
    command = load_command(name)
    assert isinstance(command, typer.core.TyperCommand | typer.core.TyperGroup)
    first = " ".join(command.help.split("\n\n")[0].split())
    assert first.startswith(COMMANDS[name][1])
    assert COMMANDS[name][1].endswith(".")


def late_imports() -> list[str]:
    found = set()
    for path in FILES:
        if path.name == "loading_probe.py":
            continue  # a program of its own, which imports only after it has locked itself up
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= {
                    f"{path.parent.name}/{path.name}:{node.lineno} {ast.unparse(node)}"
                    for node in ast.walk(function)
                    if isinstance(node, ast.Import | ast.ImportFrom)
                }
    return sorted(found)


def test_imports_inside_functions_stay_few():
    late = late_imports()
    assert len(late) <= MOST_LATE_IMPORTS, "\n".join(late)

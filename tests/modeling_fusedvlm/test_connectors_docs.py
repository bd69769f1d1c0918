"""docs/connectors.md from its first line to its last: a connector that is not in the list, made, trained, carried off."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fusedvlm
from fusedvlm.cli import app
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import BUILT_IN, CONNECTORS
from fusedvlm.tests.trainers import smoke

PAGE = Path(fusedvlm.__file__).parent.parent / "docs" / "connectors.md"
if not PAGE.exists():
    pytest.skip("docs are not part of an installed package", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF\n", re.DOTALL | re.MULTILINE)


def run_line(line: str) -> str:
    words = shlex.split(line)
    if words[0] == "export":
        return ""
    if words[0] == "fusedvlm":
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        return result.output
    assert words[0] == "python", line
    command = [sys.executable, *words[1:]]
    if words[1] == "elsewhere.py":
        hidden = "import sys; sys.modules['fusedvlm'] = None; exec(open('elsewhere.py').read())"
        command = [sys.executable, "-c", hidden]
    environment = {**os.environ, "HF_MODULES_CACHE": str(Path("modules").absolute()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smoke.write_data(tmp_path / "data", count=4).rename(tmp_path / "data" / "smoke.jsonl")
    printed = {}
    try:
        for kind, block in BLOCKS:
            if kind == "python":
                with contextlib.redirect_stdout(io.StringIO()) as shown:
                    exec(compile(block, "docs/connectors.md", "exec"), {})
                printed["python"] = shown.getvalue()
                continue
            for name, text in HEREDOC.findall(block):
                Path(name).write_text(text, encoding="utf-8")
            for line in HEREDOC.sub("", block).strip().splitlines():
                printed[line] = run_line(line)
    finally:
        CONNECTORS.pop("salient", None)
    assert "take 16 or 36 per view" in printed["python"]
    assert "Connector                       salient" in printed["fusedvlm info runs/salient/final"]
    assert "SalientConnector" in printed["python elsewhere.py"]
    card = (tmp_path / "runs" / "salient" / "final" / "README.md").read_text(encoding="utf-8")
    assert "The patches with the largest features become tokens" in card
    assert "every m from 1 to 4" in card


def test_the_table_has_every_connector():
    assert set(re.findall(r"^\| `(\w+)`", TEXT, re.MULTILINE)) == {kind.name for kind in BUILT_IN}

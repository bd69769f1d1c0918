"""docs/publishing.md: its commands run in one shell, on a family of the quickstart at its smallest."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusedvlm.tests import fork_server
from fusedvlm.tests.pages import Page, blocks_of, names_of

ROOT = Path(__file__).parents[2]
BLOCKS = blocks_of(ROOT / "docs" / "publishing.md", "bash")


class Shell:
    """One bash that runs block after block: what a block exports or starts is there for the next."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.blocks, self.said, self.errors = folder, 0, "", (folder / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            ["bash"], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.process.stdin.write("trap 'kill $(jobs -p)' EXIT\n")

    def run(self, language: str, source: str) -> None:
        """Run a block as `bash -euo pipefail` would."""
        self.blocks += 1
        script = self.folder / f"block-{self.blocks}.sh"
        script.write_text(source, encoding="utf-8")
        end = f"-- end of block {self.blocks} --"
        command = f"set -euo pipefail; source {script} < /dev/null; set +euo pipefail; echo '{end}'\n"
        try:
            self.process.stdin.write(command)
            self.process.stdin.flush()
        except OSError:
            pytest.fail("the shell ended with an earlier block")
        for line in self.process.stdout:
            if line.strip() == end:
                return
            self.said += line
        pytest.fail(f"{source}\n{self.said[-2000:]}{self.complaints()[-4000:]}")

    def complaints(self) -> str:
        """All that was written to standard error."""
        return Path(self.errors.name).read_text(encoding="utf-8")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it ended with a block that failed
            self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        self.errors.close()


@pytest.fixture(scope="module")
def shell(quickstart_family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("publishing")
    shutil.copytree(quickstart_family.folder, folder / "runs" / "quickstart")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {
        **inherited,
        "PATH": f"{Path(fork_server.executable()).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    shell = Shell(folder, environment)
    yield shell
    shell.close()


@pytest.fixture(scope="module")
def page(shell):
    return Page(BLOCKS, shell.run)


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=names_of(BLOCKS))
def test_block(page, number):
    page.run(number)


def test_what_the_commands_say(page, shell):
    page.finish()
    said = shell.said
    assert "nothing was sent" in said
    assert said.count("private, v1.0 at") == 2
    assert said.count("public, v1.0 at") == 2 + 3, "two variants; a base and two adapters"
    assert "Q: list all objects" in said
    assert said.count("public, v1.1 at") == 2
    assert "ada/low-base  m = 4, public, v1.0 at" in said
    token = re.search(r"HF_TOKEN=(\S+)", (shell.folder / "hub.env").read_text())[1]
    assert token not in said + shell.complaints()

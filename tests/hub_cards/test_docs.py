"""docs/publishing.md: its commands run as one script, on a family of the quickstart at its smallest."""

from fusedvlm.tests import fork_server
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_page(tmp_path):
    from fusedvlm.quickstart.run import run
    from fusedvlm.tests.quickstart.test_quickstart import TINY

    run(TINY, tmp_path / "runs" / "quickstart", "fusedvlm quickstart")
    script = tmp_path / "page.sh"
    script.write_text("trap 'kill $(jobs -p)' EXIT\n" + "\n".join(BLOCKS), encoding="utf-8")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {
        **inherited,
        "PATH": f"{Path(fork_server.executable()).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = done.stdout
    assert "nothing was sent" in said
    assert said.count("private, v1.0 at") == 2
    assert said.count("public, v1.0 at") == 2 + 3, "two variants; a base and two adapters"
    assert "Q: list all objects" in said
    assert said.count("public, v1.1 at") == 2
    assert "ada/low-base  m = 4, public, v1.0 at" in said
    token = re.search(r"HF_TOKEN=(\S+)", (tmp_path / "hub.env").read_text())[1]
    assert token not in said + done.stderr

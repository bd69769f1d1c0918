"""A stranger's first minutes: `python tests/stranger.py`. A fresh clone, a new shell with nothing of ours in it, and the
README's own blocks, typed one after the other, until the first right answer. Downloads what the README installs."""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|bash|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MINUTES = 5.0  # after installation


def main() -> None:
    """Raises `AssertionError`, or what a command failed with, when a stranger would have been stuck."""
    shown = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    install, ask, printed, python, also_printed = (code for _, code in shown[:5])
    assert [kind for kind, _ in shown[:5]] == ["bash", "bash", "text", "python", "text"]
    with tempfile.TemporaryDirectory(prefix="stranger-") as name:
        clone = Path(name) / "fusedvlm"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {"HOME": name, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        environment |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}

        def shell(script: str) -> str:
            command = ["bash", "--noprofile", "--norc", "-euo", "pipefail", "-c", script]
            done = subprocess.run(command, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            return done.stdout

        began = time.monotonic()
        shell(install)
        installed = time.monotonic()
        activated = next(line.rpartition("&& ")[2] for line in install.splitlines() if "activate" in line)
        answers = shell(f"{activated}\n{ask}")
        assert answers.rstrip() == printed.rstrip(), answers
        (clone / "ask.py").write_text(python, encoding="utf-8")
        answers = shell(f"{activated}\npython ask.py")
        assert answers.rstrip() == also_printed.rstrip(), answers
        took = time.monotonic() - installed
    assert took < 60 * MINUTES, f"the first right answers took {took:.0f} s"
    print(f"Installed in {installed - began:.0f} s; right answers {took:.0f} s later.")


if __name__ == "__main__":
    main()

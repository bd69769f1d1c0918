"""Run transformers' model linter on the files that travel to the Hub.

Two of its rules are about transformers' own repository and are switched off here; everything else is on.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import mlinter

NOT_FOR_US = {
    "TRF028": "asks for the license header of transformers' repository",
    "TRF057": "asks for the decorator that generates transformers' documentation pages",
}


def main() -> int:
    """Lint the files given on the command line; exit code of the linter."""
    rules = (Path(mlinter.__file__).parent / "rules.toml").read_text(encoding="utf-8")
    for rule in NOT_FOR_US:
        rules, count = re.subn(rf"(\[rules\.{rule}\]\n(?:[^\[].*\n)*?default_enabled = )true", r"\1false", rules)
        if count != 1:
            raise SystemExit(f"The linter no longer has a rule {rule} that is on; drop it from {__file__}.")
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(rules)
        file.flush()
        command = [str(Path(sys.executable).with_name("mlinter")), "--no-progress", "--no-cache"]
        return subprocess.run([*command, "--rules-toml", file.name, *sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())

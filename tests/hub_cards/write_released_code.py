"""Add a release to hub_cards/check/released_code.json: `python tests/hub_cards/write_released_code.py 0.2.0 [COMMIT]`.

COMMIT is where the release is, the present one by default. A variant whose code is that of a listed release, byte for
byte, is no foreign code to `fusedvlm check`.
"""

import fnmatch
import json
import subprocess
import sys
from pathlib import Path

from fusedvlm.hub_cards.check.foreign_code import RELEASED, code_digest
from fusedvlm.hub_code import CODE_PATTERNS

ROOT = Path(__file__).parents[2]


def git(*arguments: str) -> bytes:
    """What git prints."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout


def code_at(commit: str) -> dict[str, str]:
    """{file: digest} of the code that travelled with variants at a commit."""
    found = {}
    for folder, patterns in CODE_PATTERNS.items():
        for path in git("ls-tree", "--name-only", commit, folder + "/").decode().splitlines():
            name = path.rpartition("/")[2]
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                found[name] = code_digest(git("show", f"{commit}:{path}"))
    return found


def main(version: str, commit: str = "HEAD") -> None:
    """Write the list with one version more."""
    document = json.loads(RELEASED.read_text(encoding="utf-8")) if RELEASED.exists() else {"versions": {}}
    document["versions"][version] = code_at(commit)
    RELEASED.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

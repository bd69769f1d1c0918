"""Fetch the test classes of the transformers release in use, from its source distribution on the package index.

    python tests/common/fetch.py

The wheel has no tests. The source distribution has `tests/test_*.py` of exactly its version, but not
`tests/generation`, `tests/exporters` and `tests/utils`. The files are kept beside the installed packages and never
copied into this repository.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

PACKAGE = "transformers_common_tests"


def folder() -> Path:
    """Where the files of this version are kept; the folder may not exist."""
    return Path(sys.prefix) / "share" / f"transformers-tests-{transformers.__version__}"


def fetch() -> Path:
    """Download and unpack once. Raises `subprocess.CalledProcessError` when the index does not have the version."""
    target = folder() / PACKAGE
    if (target / "__init__.py").exists():
        return folder()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        requirement = f"transformers=={transformers.__version__}"
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        with tarfile.open(next(Path(scratch).glob("transformers-*.tar.gz"))) as archive:
            for member in archive:
                parts = Path(member.name).parts
                if len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    (target / parts[2]).write_bytes(archive.extractfile(member).read())
    (target / "__init__.py").write_text("")  # last: its presence says that the folder is complete
    return folder()


if __name__ == "__main__":
    try:
        print(fetch())
    except subprocess.CalledProcessError:
        sys.stderr.write("transformers' test classes could not be fetched; the tests that use them will be skipped.\n")

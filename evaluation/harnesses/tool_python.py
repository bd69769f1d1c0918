"""The Python of an evaluation tool that has an environment of its own, beside ours."""

import os
from pathlib import Path


def find_python(harness: str, name: str, variable: str, holds: str) -> Path:
    """The Python that has a tool: the one that an environment variable names, else that of `make env-NAME`.

    Args:
        harness: as `--harness` calls the tool.
        name: of the make target and of its folder, `.venv-NAME`.
        variable: the environment variable.
        holds: what has to be installed there, for the message.

    Raises:
        ValueError: saying how to install it.
    """
    path = Path(os.environ.get(variable) or Path(f".venv-{name}") / "bin" / "python")
    if not path.is_file():
        raise ValueError(
            f"--harness {harness}: {path} does not exist. In a checkout `make env-{name}` installs it; else name the "
            f"Python that has {holds} in ${variable}."
        )
    return path

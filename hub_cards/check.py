"""`fusedvlm check`: is a folder the complete and sound repository of a variant?"""

from dataclasses import dataclass
from pathlib import Path

from .bundle import Files


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file (path in the repository), and what."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def check_files(files: Files, repo_id: str | None = None) -> list[Problem]:
    """Problems of a repository's files, without loading the model. Empty when all is well."""
    raise NotImplementedError


def check_folder(path: Path) -> list[Problem]:
    """Problems of a folder, including whether it loads and answers without this package."""
    raise NotImplementedError

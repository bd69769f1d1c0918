"""Folders or a Hub repository through all checks."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from fusedvlm.hub_cards.facts import HUB_ID
from fusedvlm.hub_cards.hub_errors import CALL_ERRORS, explain
from fusedvlm.hub_cards.release.release_files import CARD, CHECKSUMS
from fusedvlm.hub_cards.release.variant_release import find_variants

from .repository_check import ADAPTER_CONFIG, check_folder, folder_files

if TYPE_CHECKING:
    from .repository_check import Problem


@dataclass(frozen=True)
class Report:
    """What was found in one folder or repository."""

    target: str
    files: int
    loaded: bool
    problems: "list[Problem]"

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        if self.problems:
            lines = [f"{self.target}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"]
            return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])
        loads = "loads and answers without this package" if self.loaded else "not loaded"
        return f"{self.target}: sound, {self.files} files, {loads}"


def verify(target: str, revision: str | None = None, load: bool = True) -> list[Report]:
    """Check a variant's folder, every variant of a family's folder, or a repository.

    Raises:
        ValueError: when there is neither such a folder nor such a repository.
    """
    if Path(target).is_dir():
        if revision is not None:
            raise ValueError(f"{target} is a folder; --revision is for repositories.")
        return [_report(str(folder), folder, None, load) for folder in _folders(Path(target))]
    if not HUB_ID.fullmatch(target):
        raise ValueError(f"{target}: no such folder, and not a repository id like user/name.")
    with downloaded(target, revision) as folder:
        return [_report(f"{target}@{revision}" if revision else target, folder, target, load)]


def _report(target: str, folder: Path, repo_id: str | None, load: bool) -> Report:
    problems = check_folder(folder, repo_id, load)
    files = folder_files(folder)
    return Report(target, len(files), load and not problems and ADAPTER_CONFIG not in files, problems)


def _folders(path: Path) -> list[Path]:
    """The folder itself when anything of a repository is in it, else the variants in it."""
    parts = ("config.json", "adapter_config.json", CARD, CHECKSUMS)
    if any((path / name).exists() for name in parts):
        return [path]
    # Damaged variants of a family are to be reported, so any folder with a card counts.
    carded = [folder for folder in sorted(path.iterdir()) if (folder / CHECKSUMS).exists()]
    return carded or find_variants(path)


@contextmanager
def downloaded(repo_id: str, revision: str | None) -> Iterator[Path]:
    """A repository's files at a revision, in a temporary folder.

    Raises:
        ValueError: when the repository or the revision does not exist.
        PushError: when the Hub cannot be asked.
    """
    with tempfile.TemporaryDirectory(prefix="fusedvlm-repo-") as folder:
        try:
            snapshot_download(repo_id, revision=revision, local_dir=folder)
        except RevisionNotFoundError as error:
            raise ValueError(f"{repo_id}: has no revision {revision!r}.") from error
        except RepositoryNotFoundError as error:
            raise ValueError(f"{repo_id}: no such folder, and no such repository is visible to you.") from error
        except CALL_ERRORS as error:
            raise explain(error, repo_id) from error
        yield Path(folder)

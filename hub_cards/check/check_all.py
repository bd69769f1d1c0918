"""Folders or a Hub repository through all checks."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from fusedvlm.hub_cards.hub_errors import CALL_ERRORS, explain
from fusedvlm.hub_cards.release.release_files import CARD, CHECKSUMS
from fusedvlm.hub_cards.release.variant_release import find_variants
from fusedvlm.model_source import require_folder_or_repository

from .repository_check import Problem, check_and_load
from .repository_files import folder_files


@dataclass(frozen=True)
class Report:
    """What was found in one folder or repository.

    Args:
        target: what was checked.
        files: how many files it has.
        loaded: whether it was loaded and asked, and answered.
        problems: what is wrong.
        isolation: what the process that loaded it was kept from, empty when there was none.
        base: for an adapter, the repository and commit that it belongs to; it is not checked with it.
    """

    target: str
    files: int
    loaded: bool
    problems: "list[Problem]"
    isolation: dict[str, str] = field(default_factory=dict)
    base: str | None = None

    def to_dict(self) -> dict:
        """Plain data; what says nothing is left out of the problems."""
        problems = [{name: value for name, value in asdict(problem).items() if value} for problem in self.problems]
        return {**asdict(self), "problems": problems}

    def __str__(self) -> str:
        if self.problems:
            lines = [f"{self.target}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"]
            lines += (f"  {problem}" for problem in self.problems)
            lines += (f"\n{problem.diff}" for problem in self.problems if problem.diff)
            if any(problem.foreign_code for problem in self.problems) and not self.isolation:
                lines.append("\nForeign code was not run; read it, then --run-foreign-code loads it, locked up.")
        else:
            loads = "loads and answers without this package" if self.loaded else "not loaded"
            lines = [f"{self.target}: sound, {self.files} files, {loads}"]
        if self.isolation:
            held = self.isolation
            lines.append(
                f"  its process had {held['network']}, {held['files']}, limits on {held['limits']}, no secrets"
            )
        if self.base is not None:
            lines.append(f"  its base {self.base} is a repository of its own: check that as well")
        return "\n".join(lines)


def verify(target: str, revision: str | None = None, load: bool = True, run_foreign_code: bool = False) -> list[Report]:
    """Check a variant's folder, every variant of a family's folder, or a repository.

    Args:
        target: folder or repository.
        revision: of the repository.
        load: whether to load what is in order and ask it, in a process without network, secrets and home.
        run_foreign_code: also load a variant whose only fault is that its code is none of this package's.

    Raises:
        ValueError: when there is neither such a folder nor such a repository.
    """
    options = {"load": load, "run_foreign_code": run_foreign_code}
    if Path(target).is_dir():
        if revision is not None:
            raise ValueError(f"{target} is a folder; --revision is for repositories.")
        return [_report(str(folder), folder, None, **options) for folder in _folders(Path(target))]
    require_folder_or_repository(target)
    with downloaded(target, revision) as folder:
        return [_report(f"{target}@{revision}" if revision else target, folder, target, **options)]


def _report(target: str, folder: Path, repo_id: str | None, **options: bool) -> Report:
    problems, loaded = check_and_load(folder, repo_id, **options)
    answers = loaded is not None and loaded.problem is None
    isolation = {} if loaded is None else loaded.isolation
    return Report(target, len(folder_files(folder)), answers, problems, isolation, _base(folder))


def _base(folder: Path) -> str | None:
    """Repository and commit of an adapter's base."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return f"{config['base_model_name_or_path']} at {config['revision']}"
    except (OSError, ValueError, LookupError, TypeError):
        return None


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

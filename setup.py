"""What pyproject.toml cannot say: no wheel holds the tests, and an editable install shows itself to type checkers.

Folder X imports as `fusedvlm.X` through the map in pyproject.toml. Python follows it by a hook of setuptools; mypy,
pyright and editors do not run hooks. For them `build/links/fusedvlm` holds links to the folders, and the editable
install names `build/links` on the path of the environment; Python itself never imports through the links.
"""

import os
import shutil
import warnings
from pathlib import Path

from setuptools import Command, find_namespace_packages, setup
from setuptools.command.build_py import build_py

TESTS = "fusedvlm.tests"
ROOT = Path(__file__).resolve().parent
LINKS = ROOT / "build" / "links"
# A .pth file: the path, for those who read paths, and a finder that finds nothing there, for Python itself.
PATH_FILE = (
    "import sys, types; sys.path_importer_cache[{path!r}] = "
    "types.SimpleNamespace(find_spec=lambda name, target=None: None)\n{path}\n"
)


# Every editable install is told that a folder of the package's name may hide it; the one here is the package's own.
warnings.filterwarnings("ignore", message="Editable installation")


class BuildWithoutTests(build_py):
    """Packages of a wheel are the library's; an editable install has the tests' folders too, each file linked."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [package for package in self.packages if package != TESTS]
        if self.editable_mode:
            self.packages += [TESTS, *(f"{TESTS}.{folder}" for folder in find_namespace_packages("tests"))]

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            self.run_command("links")
            site_packages = Path(self.get_finalized_command("install").install_purelib)
            site_packages.mkdir(parents=True, exist_ok=True)
            (site_packages / "fusedvlm_links.pth").write_text(PATH_FILE.format(path=str(LINKS)), encoding="utf-8")


class Links(Command):
    """Make build/links/fusedvlm anew."""

    user_options = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        package = LINKS / "fusedvlm"
        shutil.rmtree(package, ignore_errors=True)
        package.mkdir(parents=True)
        folders = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("fusedvlm", "tests")]
        own = [path for path in (ROOT / "fusedvlm").iterdir() if path.name != "__pycache__"]
        for path in [*folders, *own]:
            try:
                (package / path.name).symlink_to(os.path.relpath(path, package))
            except OSError:  # Windows without developer mode: editors find the sources less well, nothing else
                return


setup(cmdclass={"build_py": BuildWithoutTests, "links": Links})

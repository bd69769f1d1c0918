"""What pyproject.toml cannot say: the tests import as `fusedvlm.tests` from a checkout, and no wheel holds them."""

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

TESTS = "fusedvlm.tests"


class BuildWithoutTests(build_py):
    """Packages of a wheel are the library's; an editable install has the tests' folders too, each file linked."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [package for package in self.packages if package != TESTS]
        if self.editable_mode:
            self.packages += [TESTS, *(f"{TESTS}.{folder}" for folder in find_namespace_packages("tests"))]


setup(cmdclass={"build_py": BuildWithoutTests})

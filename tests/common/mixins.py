"""transformers' own test classes, importable, or the reason why not.

What the source distribution leaves out gets a stand-in here: `GenerationTesterMixin` and `ExportTesterMixin` are empty,
so their tests do not run (`test_modeling.py` and `test_equivalences.py` have ours instead).
"""

import functools
import importlib
import os
import sys
import tempfile
import types
from pathlib import Path

import pytest

from fusedvlm.tests import tiny
from fusedvlm.tests.common import fetch

# Another folder with transformers' `tests` inside, for instance a checkout that also has `tests/generation`.
OVERRIDE = "FUSEDVLM_TRANSFORMERS_TESTS"


def load(name: str) -> types.ModuleType:
    """A module of transformers' tests, e.g. "test_modeling_common"; skips the calling module where there is none."""
    place, package = _place(), fetch.PACKAGE
    if not (place / package / f"{name}.py").exists():
        pytest.skip(
            f"transformers' test classes are not there; fetch them with `python {Path(fetch.__file__)}` (network)",
            allow_module_level=True,
        )
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    _stand_in(f"{package}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in(f"{package}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in(f"{package}.utils.test_configuration_utils", config_common_kwargs={})
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=_local_picture)
    return importlib.import_module(f"{package}.{name}")


@functools.lru_cache
def _place() -> Path:
    """Folder that has the test classes as a package; a checkout's `tests` under another name, since ours has that one."""
    if OVERRIDE not in os.environ:
        return fetch.folder()
    place = Path(tempfile.mkdtemp())
    (place / fetch.PACKAGE).symlink_to(Path(os.environ[OVERRIDE]).resolve() / "tests", target_is_directory=True)
    return place


def _local_picture(url: str) -> str:
    """A picture on disk instead of a download."""
    file = Path(tempfile.gettempdir()) / f"fusedvlm-test-picture-{os.getpid()}.png"  # one per test process
    if not file.exists():
        tiny.picture(0, 64, 48).save(file)
    return str(file)


def _stand_in(name: str, **contents) -> None:
    """Put a module in place unless the real one can be found."""
    try:
        importlib.import_module(name)
    except ImportError:
        parent, _, _ = name.rpartition(".")
        if parent and parent not in sys.modules:
            try:
                importlib.import_module(parent)
            except ImportError:
                sys.modules[parent] = types.ModuleType(parent)
                sys.modules[parent].__path__ = []
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module

"""Connectors that are not part of the package: one file of the user's, loaded by path, carried along by variants."""

import importlib.util
import os
import sys
from pathlib import Path

from .modeling_fusedvlm_connector import CONNECTORS

VARIABLE = "FUSEDVLM_CONNECTORS"


def load_connector(path: str | Path) -> str:
    """Run a file that registers a connector, and return the connector's name.

    Raises:
        ValueError: when there is no such file, it cannot be imported, or it does not register exactly one connector.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a Python file that registers a connector.")
    module_name = f"fusedvlm_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file; name one that registers a connector.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path.name} cannot be imported: {type(error).__name__}: {reason}") from error
    names = [name for name, kind in CONNECTORS.items() if kind.__module__ == module_name]
    if len(names) != 1:
        raise ValueError(f"{path.name} registers {len(names)} connectors; decorate one with register_connector.")
    return names[0]


def resolve_connector(name: str) -> str:
    """The name of a connector that is given by name, or by the file that registers it (`my_connector.py`)."""
    return load_connector(name) if name.endswith(".py") else name


def load_from_environment() -> None:
    """Load the files that FUSEDVLM_CONNECTORS lists, so that every command knows them."""
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load_connector(path)

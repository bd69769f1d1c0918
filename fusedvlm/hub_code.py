"""The files of this package that travel with every variant, and run where it is not installed."""

import importlib.util
from pathlib import Path

CODE_PATTERNS = {
    "modeling_fusedvlm": ("configuration_fusedvlm.py", "modeling_fusedvlm*.py"),
    "processing": ("processing_fusedvlm*.py", "image_processing_*fusedvlm*.py"),
}


def code_files() -> list[Path]:
    """Those files, found without importing them."""
    return sorted(
        path
        for package, patterns in CODE_PATTERNS.items()
        for pattern in patterns
        for path in _home(package).glob(pattern)
    )


def _home(package: str) -> Path:
    spec = importlib.util.find_spec(f"fusedvlm.{package}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent

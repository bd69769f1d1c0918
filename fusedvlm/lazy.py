"""Public names of a package that are imported on first use, so that `fusedvlm --help` starts without PyTorch."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], also: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: its `__name__`.
        modules: public name -> module that defines it, relative to the package where it begins with a dot.
        also: public names that the package itself has.
    """
    names = sorted(modules)

    def get(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(modules[name], package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {', '.join(names)}")

    return get, lambda: [*also, *names]

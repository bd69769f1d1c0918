"""Public names of a package that are imported on first use, so that `fusedvlm --help` starts without PyTorch."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], also: Sequence[str] = (), packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: its `__name__`.
        modules: public name -> module that defines it, relative to the package where it begins with a dot.
        also: public names that the package itself has.
        packages: its sub-packages, which are names of it too.
    """
    names = sorted(modules)

    def get(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(modules[name], package), name)
        if name in packages:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {', '.join(names)}")

    return get, lambda: [*also, *names, *packages]


def late_function(module: str, name: str) -> Callable[..., Any]:
    """A function that is imported when it is called: how a class of a lower layer gets a method from a higher one."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call

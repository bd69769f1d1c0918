"""Loading a variant and asking it questions."""

import importlib

__all__ = ["VisualChat", "user_message"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(importlib.import_module("fusedvlm.serving.generate"), name)
    raise AttributeError(f"module 'fusedvlm.serving' has no attribute {name!r}")

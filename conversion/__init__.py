"""Published research checkpoints to variants and back."""

import importlib

# Public name -> module. Loaded on first use, so that the command line starts without PyTorch.
_PUBLIC = {
    "ConversionOptions": "convert",
    "ConversionReport": "convert",
    "convert_published": "convert",
    "load_published": "convert",
    "export_published": "published_export",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")

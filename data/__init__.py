"""From public datasets to one checked, mixed training set: one conversation format, readers, mixtures, filters."""

import importlib

# Public name -> module that defines it. Loaded on first use: the collators need the records only.
_PUBLIC = {
    "Mixture": "mixture",
    "MixtureEpochs": "epochs",
    "SourceSpec": "sources",
    "StreamingMixture": "streaming",
    "answers_per_segment": "records",
    "build_dataset": "build",
    "load_source": "sources",
    "read_spec": "build",
    "normalise_sample": "records",
    "text_of": "records",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")

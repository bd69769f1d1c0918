"""From public datasets to one checked, mixed training set: one conversation format, readers, mixtures, filters."""

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use: the collators need the records only.
_PUBLIC = {
    "Mixture": ".mixing.mixture",
    "SourceSpec": ".sources.source_spec",
    "StreamingMixture": ".mixing.streaming",
    "answers_per_segment": ".records",
    "build_dataset": ".sources.build_dataset",
    "load_source": ".sources.source_spec",
    "read_spec": ".sources.build_dataset",
    "normalise_sample": ".records",
    "text_of": ".records",
}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

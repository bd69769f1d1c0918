"""From public datasets to one checked, mixed training set: one conversation format, readers, mixtures, filters."""

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use: the collators need the records only.
_PUBLIC = {
    "Mixture": ".mixture",
    "MixtureEpochs": ".epochs",
    "SourceSpec": ".sources",
    "StreamingMixture": ".streaming",
    "answers_per_segment": ".records",
    "build_dataset": ".build",
    "load_source": ".sources",
    "read_spec": ".build",
    "normalise_sample": ".records",
    "text_of": ".records",
}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

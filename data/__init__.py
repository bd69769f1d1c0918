"""From public datasets to one checked, mixed training set: one conversation format, readers, mixtures, filters."""

from typing import TYPE_CHECKING

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
    "remap_boxes": ".boxes",
    "square_placement": ".boxes",
    "normalize_sample": ".records",
    "text_of": ".records",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .boxes import (
        remap_boxes as remap_boxes,
        square_placement as square_placement,
    )
    from .mixing.mixture import Mixture as Mixture
    from .mixing.streaming import StreamingMixture as StreamingMixture
    from .records import (
        answers_per_segment as answers_per_segment,
        normalize_sample as normalize_sample,
        text_of as text_of,
    )
    from .sources.build_dataset import (
        build_dataset as build_dataset,
        read_spec as read_spec,
    )
    from .sources.source_spec import (
        SourceSpec as SourceSpec,
        load_source as load_source,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

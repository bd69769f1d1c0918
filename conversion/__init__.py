"""Published research checkpoints to variants and back."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

# Public name -> module. Loaded on first use, so that the command line starts without PyTorch.
_PUBLIC = {
    "ConversionOptions": ".convert",
    "ConversionReport": ".convert",
    "convert_published": ".convert",
    "load_published": ".convert",
    "export_published": ".published_export",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .convert import (
        ConversionOptions as ConversionOptions,
        ConversionReport as ConversionReport,
        convert_published as convert_published,
        load_published as load_published,
    )
    from .published_export import export_published as export_published
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

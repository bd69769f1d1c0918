"""Published research checkpoints to variants and back."""

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
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

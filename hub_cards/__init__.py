"""Repositories on the Hub: cards from facts, whole contents, checks, pushes, a Space."""

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use.
_PUBLIC = {
    "CardFacts": ".facts",
    "Hub": ".hub",
    "Patience": ".hub",
    "Problem": ".check",
    "PushError": ".errors",
    "Release": ".release",
    "StatedFacts": ".facts",
    "build_family": ".release",
    "build_release": ".release",
    "check_files": ".check",
    "check_folder": ".check",
    "find_variants": ".release",
    "render_card": ".render",
    "space_files": ".space",
}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

"""Repositories on the Hub: cards from facts, whole contents, checks, pushes, a Space."""

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use.
_PUBLIC = {
    "CardFacts": ".facts",
    "Hub": ".hub_client",
    "RetryPolicy": "fusedvlm.retry",
    "Problem": ".check.repository_check",
    "PushError": ".hub_errors",
    "Release": ".release.variant_release",
    "StatedFacts": ".facts",
    "build_family": ".release.variant_release",
    "build_release": ".release.variant_release",
    "check_files": ".check.repository_check",
    "check_folder": ".check.repository_check",
    "find_variants": ".release.variant_release",
    "render_card": ".card.render_card",
    "space_files": ".release.space",
}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

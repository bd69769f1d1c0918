"""Repositories on the Hub: cards from facts, whole contents, checks, pushes, a Space."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # the same names for type checkers and editors
    from fusedvlm.retry import RetryPolicy as RetryPolicy

    from .card.render_card import render_card as render_card
    from .check.repository_check import (
        Problem as Problem,
        check_files as check_files,
        check_folder as check_folder,
    )
    from .facts import (
        CardFacts as CardFacts,
        StatedFacts as StatedFacts,
    )
    from .hub_client import Hub as Hub
    from .hub_errors import PushError as PushError
    from .release.space import space_files as space_files
    from .release.variant_release import (
        Release as Release,
        build_family as build_family,
        build_release as build_release,
        find_variants as find_variants,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

"""Figures, tables and the page of everything a folder holds."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

# Name -> module that defines it. Loaded on first use, so that a table does not load matplotlib.
_PUBLIC = {
    "counted_costs": ".text_tables",
    "fit_document": ".text_tables",
    "fit_table": ".text_tables",
    "fitted_curves": ".figures",
    "plan_document": ".text_tables",
    "plan_text": ".text_tables",
    "tradeoff_plot": ".figures",
    "tradeoff_text": ".text_tables",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .figures import (
        fitted_curves as fitted_curves,
        tradeoff_plot as tradeoff_plot,
    )
    from .text_tables import (
        counted_costs as counted_costs,
        fit_document as fit_document,
        fit_table as fit_table,
        plan_document as plan_document,
        plan_text as plan_text,
        tradeoff_text as tradeoff_text,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

"""How much a visual token buys: fits of score against the number of visual tokens."""

from .fit import PowerLawFit, fit_power_law

__all__ = ["PowerLawFit", "fit_power_law"]

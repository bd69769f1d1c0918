"""How much a visual token buys: fits of score against m, the theory of divergence, trade-offs and a planner."""

import importlib

# Public name -> module that defines it. Loaded on first use, so that command-line help stays instant.
_PUBLIC = {
    "Curve": "runs",
    "ScoreRecord": "runs",
    "group_curves": "runs",
    "read_scores": "runs",
    "CurveFit": "fit",
    "HeldOutError": "fit",
    "PowerLawFit": "fit",
    "bootstrap_power_law": "fit",
    "fit_curve": "fit",
    "fit_power_law": "fit",
    "held_out_error": "fit",
    "predict_interval": "fit",
    "FittedLaw": "laws",
    "fit_law": "laws",
    "rank_laws": "laws",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__

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
    "Dependency": "theory",
    "alpha_from_upsilon": "theory",
    "fit_lambda": "theory",
    "upsilon": "theory",
    "DivergenceResult": "divergence",
    "DivergenceStatistics": "divergence",
    "pair_curves": "divergence",
    "summarise": "divergence",
    "ImageBranches": "branches",
    "TextBranches": "branches",
    "GridCell": "tradeoff",
    "TradeoffFit": "tradeoff",
    "choices_for_budget": "tradeoff",
    "fit_tradeoff": "tradeoff",
    "optimal_visual_tokens": "tradeoff",
    "read_grid": "tradeoff",
    "Budget": "planner",
    "Cost": "planner",
    "Plan": "planner",
    "make_plan": "planner",
    "parse_budget": "planner",
    "read_costs": "planner",
    "read_curves": "planner",
    "Flops": "counts",
    "Shapes": "counts",
    "count_flops": "counts",
    "kv_cache_bytes": "counts",
    "read_shapes": "counts",
    "cluster_curves": "compare",
    "input_effects": "compare",
    "latency_against_m": "figures",
    "save_figure": "figures",
    "score_against_m": "figures",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__

"""Training-free reducers: keep some of a vision tower's tokens, without training anything."""

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use.
_PUBLIC = {
    "AverageTokens": ".token_reducers",
    "CDPruner": ".token_reducers",
    "ClipQuestions": ".clip_questions",
    "REDUCERS": ".token_reducers",
    "RandomTokens": ".token_reducers",
    "ReducedLlava": ".reduced_llava",
    "TokenBudget": ".token_reducers",
    "TokenReducer": ".token_reducers",
    "TowerFeatures": ".tower_features",
    "VisPruner": ".token_reducers",
    "VisionZip": ".token_reducers",
    "build_reducer": ".token_reducers",
    "read_tower": ".tower_features",
}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

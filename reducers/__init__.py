"""Training-free reducers: keep some of a vision tower's tokens, without training anything."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use.
_PUBLIC = {
    "AverageTokens": ".token_reducers",
    "CDPruner": ".token_reducers",
    "ClipQuestions": ".clip_questions",
    "REDUCERS": ".token_reducers",
    "RandomTokens": ".token_reducers",
    "ReducedDense": ".reduced_dense",
    "ReducedLlava": ".reduced_llava",
    "ReducedModel": ".reduced_model",
    "TokenBudget": ".token_reducers",
    "TokenReducer": ".token_reducers",
    "TowerFeatures": ".tower_features",
    "VisPruner": ".token_reducers",
    "VisionZip": ".token_reducers",
    "build_reducer": ".token_reducers",
    "read_tower": ".tower_features",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .clip_questions import ClipQuestions as ClipQuestions
    from .reduced_dense import ReducedDense as ReducedDense
    from .reduced_llava import ReducedLlava as ReducedLlava
    from .reduced_model import ReducedModel as ReducedModel
    from .token_reducers import (
        REDUCERS as REDUCERS,
        AverageTokens as AverageTokens,
        CDPruner as CDPruner,
        RandomTokens as RandomTokens,
        TokenBudget as TokenBudget,
        TokenReducer as TokenReducer,
        VisionZip as VisionZip,
        VisPruner as VisPruner,
        build_reducer as build_reducer,
    )
    from .tower_features import (
        TowerFeatures as TowerFeatures,
        read_tower as read_tower,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

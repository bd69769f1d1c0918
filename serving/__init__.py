"""Loading a variant and asking it questions."""

from fusedvlm.lazy import lazy_names

_PUBLIC = {"VisualChat": ".chat", "user_message": ".chat"}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

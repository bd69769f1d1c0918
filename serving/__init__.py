"""Loading a variant and asking it questions."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

_PUBLIC = {"VisualChat": ".chat", "user_message": ".chat"}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .chat import (
        VisualChat as VisualChat,
        user_message as user_message,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

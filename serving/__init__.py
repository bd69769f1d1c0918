"""Loading a variant and asking it questions."""

from .generate import VisualChat, user_message

__all__ = ["VisualChat", "user_message"]

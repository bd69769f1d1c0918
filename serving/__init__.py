"""Loading a variant, asking it questions, and serving it."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

_PUBLIC = {
    "ChatServer": ".app",
    "LocalOptions": ".local_server",
    "VisualChat": ".chat",
    "build_server": ".local_server",
    "run_server": ".local_server",
    "run_vllm": ".vllm_serve",
    "user_message": ".chat",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .app import (
        ChatServer as ChatServer,
    )
    from .chat import (
        VisualChat as VisualChat,
        user_message as user_message,
    )
    from .local_server import (
        LocalOptions as LocalOptions,
        build_server as build_server,
        run_server as run_server,
    )
    from .vllm_serve import (
        run_vllm as run_vllm,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

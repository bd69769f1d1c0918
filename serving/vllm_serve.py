"""Start `vllm serve` with our plugin."""

from typing import Any


def run_vllm(model: str, **options: Any) -> None:
    """Not there yet."""
    raise ValueError("--engine vllm is not there yet.")

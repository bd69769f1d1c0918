"""Shipped training recipes (YAML), presets and accelerate configurations; read through `recipe_files`."""

from pathlib import Path

FOLDER = Path(__file__).parent

__all__ = ["FOLDER"]

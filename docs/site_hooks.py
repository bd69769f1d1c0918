"""Hooks of the docs' site: API pages from the public tables of the packages, links to files that are no pages as text.

`make docs` calls them; see mkdocs.yml.
"""

import importlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

# Page -> packages whose public names it shows.
API = {
    "models": ("Models", ["fusedvlm.modeling_fusedvlm"]),
    "processing": ("Processing", ["fusedvlm.processing"]),
    "training": ("Training", ["fusedvlm.trainers"]),
    "serving": ("Asking", ["fusedvlm.serving"]),
    "data": ("Data", ["fusedvlm.data"]),
    "reducers": ("Reducers", ["fusedvlm.reducers"]),
    "scaling": ("Scaling", ["fusedvlm.scaling"]),
    "publishing": ("Publishing", ["fusedvlm.hub_cards"]),
    "conversion": ("Conversion", ["fusedvlm.conversion"]),
}
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+|example_card/[^)]*)\)")


def public_objects(package: str) -> list[str]:
    """Where each public class and function of a package is defined, in alphabetical order of their names."""
    module = importlib.import_module(package)
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value) and getattr(value, "__module__", "").startswith("fusedvlm."):
            found.append(f"{value.__module__}.{value.__qualname__}")
    return found


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each entry of `API`."""
    for page, (title, packages) in API.items():
        blocks = [f"::: {path}" for package in packages for path in public_objects(package)]
        files.append(File.generated(config, f"api/{page}.md", content="\n\n".join([f"# {title}", *blocks])))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Files of the repository that are not on the site are named, not linked."""
    return OUTSIDE.sub(lambda match: f"{match[1]} (`{match[2].removeprefix('../')}` in the repository)", markdown)

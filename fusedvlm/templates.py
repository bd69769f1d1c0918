"""Jinja templates of the package: a name that a template asks for and does not get is an error."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2


@lru_cache(maxsize=32)
def _environment(folder: Path, is_html: bool, lstrip_blocks: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=lstrip_blocks,
        keep_trailing_newline=True,
        autoescape=is_html,
    )


def load_template(
    path: Path,
    *,
    is_html: bool = False,
    lstrip_blocks: bool = False,
    filters: Mapping[str, Callable[..., Any]] | None = None,
) -> jinja2.Template:
    """A template file.

    Args:
        path: of the file; what it includes or extends lies beside it.
        is_html: whether values are escaped for HTML.
        lstrip_blocks: whether white space in front of a block tag at the start of a line goes.
        filters: further filters by name.
    """
    environment = _environment(path.parent, is_html, lstrip_blocks)
    if filters:
        environment = environment.overlay()
        environment.filters = {**environment.filters, **filters}
    return environment.get_template(path.name)

"""Options that every `fusedvlm data` command has: which training set is meant."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusedvlm.data.sources.find_files import require_files

Spec = Annotated[
    str,
    typer.Argument(
        help="YAML with a data section (sources: [{type, path, ...}]), a recipe with one under data:, or a data file.",
        metavar="SPEC",
    ),
]
Kind = Annotated[
    str | None,
    typer.Option("--type", help="Layout of a data file: llava, svit, docdownstream, chat, webdataset, parquet."),
]
Images = Annotated[
    str | None, typer.Option("--images", help="Folder that image paths are relative to; the file's own by default.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def data_section(spec: str, kind: str | None, images: str | None) -> Any:
    """What SPEC, --type and --images mean together.

    Raises:
        ValueError: when they contradict each other, or name no file.
    """
    check_spec(spec, kind)
    from fusedvlm.data.sources.build_dataset import read_spec

    if spec.endswith((".yaml", ".yml")):
        if kind or images:
            raise ValueError("--type and --images describe a data file; in a YAML write type: and image_folder:.")
        return read_spec(spec)
    if kind is None:
        raise ValueError(f"Say with --type what layout {spec} has, or give a YAML with a data section.")
    return {"sources": [{"type": kind, "path": spec, "image_folder": images}]}


def check_spec(spec: str, kind: str | None) -> None:
    """Raise `ValueError` for a SPEC that is not there; commands ask before they import what reads it."""
    if not spec.endswith((".yaml", ".yml")):
        require_files(kind, spec)
    elif kind is None and not Path(spec).is_file():
        raise ValueError(f"{spec}: no such file.")

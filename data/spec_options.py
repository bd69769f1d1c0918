"""Options that every `fusedvlm data` command has: which training set is meant."""

from typing import Annotated, Any

import typer

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
        ValueError: when they contradict each other.
    """
    from fusedvlm.data.sources.build_dataset import read_spec

    if spec.endswith((".yaml", ".yml")):
        if kind or images:
            raise ValueError("--type and --images describe a data file; in a YAML write type: and image_folder:.")
        return read_spec(spec)
    if kind is None:
        raise ValueError(f"Say with --type what layout {spec} has, or give a YAML with a data section.")
    return {"sources": [{"type": kind, "path": spec, "image_folder": images}]}

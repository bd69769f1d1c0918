"""The toy that ships with the package: the recorded quickstart's weights, written to a folder like any variant's."""

import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fusedvlm.console import emit_json, show
from fusedvlm.hub_code import code_files

TRAINED = Path(__file__).parent / "trained"
VARIANT = "fusedvlm-m32"


def toy(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it goes.")] = Path("toy"),
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a small trained variant and a picture to ask it about, in a second: nothing is trained or downloaded.

    The weights (2 MB) are those of the recorded run of `fusedvlm quickstart`, seed 0, trained from scratch on rendered
    pictures of 64 x 64 pixels; results.json beside them holds its scores. They know colored shapes and letters on a
    4 x 4 grid, and nothing else.

    Example: fusedvlm toy && fusedvlm describe toy/scene.png --model toy/fusedvlm-m32 -q "colour at a3" -m 1
    """
    write_toy(output)
    variant, scene = output / VARIANT, output / "scene.png"
    if json_output:
        emit_json({"model": str(variant), "image": str(scene), "results": str(output / "results.json")})
        return
    show(f"{variant}  a toy trained on rendered pictures; answers at every m from 1 to 32")
    show(f"{scene}  a picture it was not trained on")
    show(f'Ask it: fusedvlm describe {scene} --model {variant} --question "list all objects"')


def write_toy(output: Path) -> None:
    """Write the toy's folder, whole or not at all; one that is there already stays.

    Raises:
        ValueError: when something else is in the folder.
    """
    if output.is_dir() and any(output.iterdir()):
        if _is_written(output):
            return
        raise ValueError(f"{output}: something else is there already; give another FOLDER, or move it away.")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        for name, source in _files():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
        if output.is_dir():
            output.rmdir()
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_written(output: Path) -> bool:
    """Whether the folder holds the toy: every file of it, unchanged."""
    return all(
        (output / name).is_file() and filecmp.cmp(source, output / name, shallow=False) for name, source in _files()
    )


def _files() -> Iterator[tuple[Path, Path]]:
    """(Name in the toy's folder, file it is copied from)."""
    yield from ((path.relative_to(TRAINED), path) for path in TRAINED.rglob("*") if path.is_file())
    yield from ((Path(VARIANT) / source.name, source) for source in code_files())

"""Weights by their values: damage that names and shapes do not show."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from fusedvlm.console import progress

PIECE = 1 << 24  # elements looked at together, so that a large tensor is not copied
LONG_WORK = 2_000_000_000  # bytes; below, a progress bar is gone before it is read


def value_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of tensors that hold NaN or infinities, and of those that are nothing but zeros.

    A bias may be zero; a matrix, an embedding or a scale that is was never trained or was lost.

    Args:
        folder: whose safetensors files are sound by their headers.
    """
    files = sorted(folder.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    with progress(total=total, description="weights", unit="B", unit_scale=True, disable=total < LONG_WORK) as bar:
        for path in files:
            with safe_open(path, framework="pt") as file:
                names = sorted(file.keys())
                for name in names:
                    tensor = file.get_tensor(name)
                    if what := tensor_problem(name, tensor):
                        yield path.name, what
                    bar.update(tensor.numel() * tensor.element_size())


def tensor_problem(name: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the values of one tensor (any shape); None when nothing is."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    bad, zero = 0, True
    for piece in tensor.flatten().split(PIECE):
        piece = piece.float()  # eight-bit floats know neither question
        bad += int((~piece.isfinite()).sum())
        zero = zero and not piece.any()
    if bad:
        return f"{name} holds {bad} values that are not finite numbers"
    return f"{name} is nothing but zeros" if zero and not name.endswith("bias") else None

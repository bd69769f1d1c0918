"""Rows of all ranks for losses over the global batch; ranks may have different numbers of them, or none."""

import torch
from torch import distributed


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of every rank, in rank order.

    A loss that every rank computes from all of them is the global loss, and what flows back to a rank's own rows is
    their whole gradient; it is multiplied by the number of ranks, so that data parallelism's mean over ranks leaves it
    as it is. The other ranks' rows are constants.

    Args:
        rows: (N_rank, d).

    Returns:
        (N of all ranks, d); the argument itself on one process.
    """
    if not has_other_ranks():
        return rows
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(ranks)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(gathered, padded)
    parts = [part[: int(count)] for part, count in zip(gathered, counts, strict=True)]
    parts[rank] = rows + (ranks - 1) * (rows - rows.detach())
    return torch.cat(parts)


def has_other_ranks() -> bool:
    """Whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def reduced(number: int, operation: distributed.ReduceOp.RedOpType, device: torch.device) -> int:
    """A number over all ranks, which must all call this at the same place; the number itself on one process.

    Args:
        number: this rank's.
        operation: `SUM`, `MAX`, ... of `torch.distributed.ReduceOp`.
        device: the ranks' backend reduces on.
    """
    if not has_other_ranks():
        return number
    total = torch.tensor(number, device=device)
    distributed.all_reduce(total, op=operation)
    return int(total)


def mean_over_ranks(loss: torch.Tensor | float) -> float:
    """The mean of every rank's loss, the same number on all of them."""
    if not has_other_ranks():
        return float(loss)
    total = torch.as_tensor(loss).detach().clone().double()
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()

"""The two parts of the stage-1 loss: fusedvlm's docs/reference.md, "Contrastive part" and "Identity part"."""

from typing import Any

import torch
from torch import distributed
from torch.nn import functional as F

BLOCK_ROWS = 2048  # rows normalized at a time: working memory stays far below the states themselves
SMALLEST_NORM = 1e-12  # as in F.normalize: rows of zeros stay zero


def identity_loss(states: torch.Tensor, across_processes: bool = False) -> torch.Tensor:
    """Mean squared difference between the cosine Gram matrix of the query states and the identity.

    With V the N states as unit rows, mean over N x N of (V V^T - I)^2. Where N exceeds the width d the N x N matrix is
    never formed: ||V V^T - I||^2 = ||V^T V - I||^2 + N - d, which costs d x d memory, a factor N / d less arithmetic,
    and loses nothing to cancellation.

    Args:
        states: (N, d) fusion states at all queries of the batch, not normalized.
        across_processes: take N over the states of all ranks of the default process group. The value is the same on
            every rank; the gradient is that of this rank's rows times the number of ranks, so that the mean over
            ranks which data parallelism takes is the gradient of the global loss. Ranks may differ in N.

    Returns:
        Scalar in fp32 (fp64 for fp64 input); zero for an empty batch.
    """
    across_processes = across_processes and distributed.is_initialized() and distributed.get_world_size() > 1
    return _IdentityLoss.apply(states, across_processes)


class _IdentityLoss(torch.autograd.Function):
    """Keeps only the states and one matrix of min(N, d) x min(N, d) for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, across_processes: bool) -> torch.Tensor:
        count, width = states.shape
        with torch.autocast(states.device.type, enabled=False):
            # CODEPATH: fewer rows than columns, on one process: the Gram matrix is the smaller one.
            is_gram = count <= width and not across_processes
            matrix = _gram(states) if is_gram else _covariance(states)
        ranks, total = 1, count
        if across_processes:
            ranks = distributed.get_world_size()
            counter = torch.tensor(count, device=states.device)
            distributed.all_reduce(matrix)
            distributed.all_reduce(counter)
            total = int(counter)
        matrix.diagonal().sub_(1)
        ctx.save_for_backward(states, matrix)
        ctx.is_gram, ctx.factor = is_gram, 4 * ranks / max(total, 1) ** 2
        missing = 0 if is_gram else total - width
        loss = (matrix.square().sum() + missing) / max(total, 1) ** 2
        return loss if total else torch.zeros_like(loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None]:
        states, matrix = ctx.saved_tensors
        grad = torch.empty_like(states)
        with torch.autocast(states.device.type, enabled=False):
            unit_of_all = _unit(states) if ctx.is_gram else states
            for start in range(0, len(states), BLOCK_ROWS):
                rows = slice(start, start + BLOCK_ROWS)
                unit = _unit(states[rows])
                slope = matrix[rows] @ unit_of_all if ctx.is_gram else unit @ matrix
                slope = slope - unit * (unit * slope).sum(-1, keepdim=True)  # normalization removes the radial part
                slope = slope * (grad_loss * ctx.factor / _norms(states[rows]))
                grad[rows] = slope.to(grad.dtype)
        return grad, None


def _norms(states: torch.Tensor) -> torch.Tensor:
    return states.norm(dim=-1, keepdim=True, dtype=_precision(states)).clamp_min(SMALLEST_NORM)


def _unit(states: torch.Tensor) -> torch.Tensor:
    return states.to(_precision(states)) / _norms(states)


def _precision(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _gram(states: torch.Tensor) -> torch.Tensor:
    """(N, N) V V^T."""
    unit = _unit(states)
    return unit @ unit.T


def _covariance(states: torch.Tensor) -> torch.Tensor:
    """(d, d) V^T V."""
    total = torch.zeros(states.shape[1], states.shape[1], device=states.device, dtype=_precision(states))
    for start in range(0, len(states), BLOCK_ROWS):
        unit = _unit(states[start : start + BLOCK_ROWS])
        total.addmm_(unit.T, unit)
    return total


def contrastive_loss(image_embeds: torch.Tensor, answer_embeds: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over all pairs given: the k-th question belongs to the k-th answer.

    Args:
        image_embeds: (G, D) unit rows, image and question.
        answer_embeds: (G, D) unit rows, answers.
        scale: scalar, exp(logit_scale).

    Returns:
        Scalar; zero without pairs, still attached to what it depends on.
    """
    if len(image_embeds) == 0:
        return scale * (image_embeds.sum() + answer_embeds.sum())
    logits = scale * image_embeds @ answer_embeds.T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def zero_large_entries(projected: torch.Tensor) -> torch.Tensor:
    """Published batch-dependent mask: entries outside mean +- one standard deviation of the whole matrix become 0.

    Kept for conformance only. It removes the largest third of the entries, and which ones depends on the batch.

    Args:
        projected: (G, D) projected answers before normalization.
    """
    mean, deviation = projected.mean(), projected.std()
    keep = (projected >= mean - deviation) & (projected <= mean + deviation)
    return torch.where(keep, projected, torch.zeros_like(projected))

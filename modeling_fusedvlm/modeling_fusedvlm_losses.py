"""The two parts of the stage-1 loss (reference section 5, paper section 4)."""

import torch
from torch.nn import functional as F


def identity_loss(states: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between the cosine Gram matrix of the query states and the identity.

    With V the N states as unit rows, mean over N x N of (V V^T - I)^2. Where N exceeds the width d the N x N matrix is
    never formed: ||V V^T - I||^2 = ||V^T V||^2 - 2 tr(V V^T) + N, which costs d x d memory.

    Args:
        states: (N, d) fusion states at all queries of the batch, not normalised.

    Returns:
        Scalar in fp32 (fp64 for fp64 input); zero for an empty batch.
    """
    count, width = states.shape
    if count == 0:
        return states.sum()
    states = states if states.dtype == torch.float64 else states.float()
    unit = F.normalize(states, dim=-1)
    if count <= width:
        gram = unit @ unit.T
        return (gram - torch.eye(count, device=gram.device, dtype=gram.dtype)).square().mean()
    covariance = unit.T @ unit
    squared = covariance.square().sum() - 2 * unit.square().sum() + count
    return squared / count**2


def contrastive_loss(image_embeds: torch.Tensor, answer_embeds: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over all pairs of this process's batch: the k-th question belongs to the k-th answer.

    Args:
        image_embeds: (G, D) unit rows, image and question.
        answer_embeds: (G, D) unit rows, answers.
        scale: scalar, exp(logit_scale).
    """
    logits = scale * image_embeds @ answer_embeds.T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def zero_large_entries(projected: torch.Tensor) -> torch.Tensor:
    """Published batch-dependent mask: entries outside mean +- one standard deviation of the whole matrix become 0.

    Kept for conformance only. It removes the largest third of the entries, and which ones depends on the batch.

    Args:
        projected: (G, D) projected answers before normalisation.
    """
    mean, deviation = projected.mean(), projected.std()
    keep = (projected >= mean - deviation) & (projected <= mean + deviation)
    return torch.where(keep, projected, torch.zeros_like(projected))

"""Losses against their naive twins."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fusedvlm.modeling_fusedvlm import modeling_fusedvlm_losses as losses
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_losses import contrastive_loss, identity_loss
from fusedvlm.trainers.generation import distillation_loss


def direct_identity_loss(states: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(states, dim=-1)
    return (unit @ unit.T - torch.eye(len(unit), dtype=unit.dtype)).square().mean()


def with_gradient(function, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states = states.clone().requires_grad_()
    loss = function(states)
    (2.5 * loss).backward()
    return loss.detach(), states.grad


@pytest.mark.parametrize("count", [1, 7, 11, 12, 64, 257])
def test_identity_loss_is_the_direct_formula(count, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_ROWS", 10)  # a partial last block
    states = torch.randn(count, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    states[0] *= 100  # rows of very different length
    for got, expected in zip(
        with_gradient(identity_loss, states), with_gradient(direct_identity_loss, states), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [5, 40])
def test_identity_loss_passes_gradcheck(count):
    states = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(identity_loss, states)


def test_single_precision_loses_nothing_to_cancellation():
    """Nearly orthonormal rows, one more than the width: the loss is a small difference of large numbers."""
    basis = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0)))[0]
    states = torch.cat([basis, basis[:1]])
    assert identity_loss(states).item() == pytest.approx(direct_identity_loss(states.double()).item(), rel=1e-5)


@pytest.mark.parametrize("count", [5, 40])
def test_zero_rows_have_no_direction(count):
    states = torch.zeros(count, 6)
    states[1:, 0] = 1
    loss, grad = with_gradient(identity_loss, states)
    assert loss == pytest.approx(direct_identity_loss(states).item())
    assert torch.equal(grad[0], torch.zeros(6))


def test_no_rows_are_no_loss_and_keep_the_graph():
    source = torch.ones(3, 4, requires_grad=True)
    identity_loss(source[:0]).backward()
    assert torch.equal(source.grad, torch.zeros(3, 4))
    source.grad, scale = None, torch.tensor(2.0, requires_grad=True)
    loss = contrastive_loss(source[:0], source[:0], scale)
    loss.backward()
    assert loss == 0
    assert torch.equal(source.grad, torch.zeros(3, 4))
    assert scale.grad == 0


def test_identity_loss_keeps_full_precision_under_autocast():
    states = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss, grad = with_gradient(identity_loss, states)
    expected, slope = with_gradient(identity_loss, states)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    torch.testing.assert_close(grad, slope)


def test_half_precision_states_get_half_precision_gradients():
    states = torch.randn(50, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss, grad = with_gradient(identity_loss, states)
    expected, slope = with_gradient(direct_identity_loss, states.double())
    assert grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (grad.double() - slope).norm() < 1e-2 * slope.norm()


def test_only_small_matrices_are_kept_for_backward():
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        identity_loss(torch.randn(500, 8, requires_grad=True))
    assert sorted(sizes) == [8 * 8, 500 * 8]


def test_contrastive_loss_is_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    images, answers = (
        F.normalize(torch.randn(5, 7, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    logits = 3.0 * images.numpy() @ answers.numpy().T
    rows = [logits[k, k] - np.log(np.exp(logits[k]).sum()) for k in range(5)]
    columns = [logits[k, k] - np.log(np.exp(logits[:, k]).sum()) for k in range(5)]
    expected = -(np.mean(rows) + np.mean(columns)) / 2
    assert contrastive_loss(images, answers, torch.tensor(3.0)).item() == pytest.approx(expected, rel=1e-12)


def test_distillation_loss_is_a_sum_over_tokens_and_words():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature, expected = 2.0, 0.0
    for own, other in zip(student.numpy(), teacher.numpy(), strict=True):
        q, p = (np.exp(row / temperature) / np.exp(row / temperature).sum() for row in (own, other))
        expected += temperature**2 * (p * np.log(p / q)).sum()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-6)
    assert distillation_loss(student, student).item() == pytest.approx(0, abs=1e-6)
    teacher.requires_grad_()
    assert not distillation_loss(student, teacher).requires_grad

"""Stage 1 over two uneven processes (gloo) is stage 1 over one: pairs and query states of the global batch."""

import pytest
import torch

from fusedvlm.tests.processes import run_ranks
from fusedvlm.tests.trainers.rank_programs import train_uneven


def test_two_uneven_processes_equal_one(backbones, tmp_path):
    ((one, weights),) = run_ranks(1, train_uneven, 2, backbones, tmp_path / "one")
    (two, others), _ = run_ranks(2, train_uneven, 1, backbones, tmp_path / "two")
    assert len(one) == 4
    assert sum(row["contrastive_loss"] > 0 for row in one) >= 2
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, abs=2e-4)
    for name, array in weights.items():
        tensor, other = torch.from_numpy(array), torch.from_numpy(others[name])
        torch.testing.assert_close(other, tensor, atol=2e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")

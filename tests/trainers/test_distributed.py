"""Two processes (gloo) see the loss of the whole batch: of contrastive pairs, of tokens, of grouped answers."""

import pytest
import torch

from fusedvlm.tests.processes import run_ranks
from fusedvlm.tests.trainers.rank_programs import train_even


@pytest.mark.parametrize("stage", ["contrastive", "generation", "grouped"])
def test_two_processes_equal_one(stage, backbones, tmp_path):
    (one,) = run_ranks(1, train_even, stage, 4, backbones, tmp_path / "one")
    two, _ = run_ranks(2, train_even, stage, 2, backbones, tmp_path / "two")
    assert one
    for name in one:
        torch.testing.assert_close(
            torch.from_numpy(one[name]),
            torch.from_numpy(two[name]),
            atol=2e-6,
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )

"""A shared world of a few images, built once; and the command line in it."""

from dataclasses import replace

import pytest
import torch

from fusedvlm.comparison.plan import GLANCE
from fusedvlm.comparison.shared_world import open_world


@pytest.fixture(scope="session")
def glance(tmp_path_factory):
    """(world, plan) at the size of `--preset glance`."""
    plan = replace(GLANCE, num_visual_tokens=(1, 4, 16))
    return open_world(plan, tmp_path_factory.mktemp("glance") / "world", torch.device("cpu")), plan

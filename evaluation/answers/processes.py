"""Several processes evaluate together, started by torchrun or `accelerate launch`: each asks its part."""

import datetime
import os
from collections.abc import Callable

import torch
from torch import distributed

from .answer_run import Share

LONGEST = datetime.timedelta(days=7)  # that one process waits for the slowest


def own_share(device: str | None) -> tuple[Share, Callable[[], None], str | None]:
    """This process's part of the records, what waits for all others, and the device it runs on.

    Args:
        device: asked for; by default each process of a machine takes an accelerator of its own.

    Raises:
        ValueError: for a number of processes and a rank that do not go together.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if not 0 <= rank < ranks:
        raise ValueError(f"RANK={rank} of WORLD_SIZE={ranks}: start processes with torchrun or accelerate launch.")
    if ranks == 1:
        return Share(), lambda: None, device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=LONGEST)
    return Share(rank, ranks), wait_for_others, device


def wait_for_others() -> None:
    """Return when every process is here; nothing is sent but that."""
    distributed.barrier()
    distributed.destroy_process_group()

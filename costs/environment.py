"""Where and how something was measured: the machine, the versions, the device to run on by default."""

import datetime
import os
import platform
from dataclasses import dataclass

import torch
import transformers


@dataclass(frozen=True)
class Environment:
    """Where and how something was measured."""

    command: str
    date: str
    hardware: str
    versions: dict[str, str]


def describe_environment(command: str) -> Environment:
    """The machine and library versions, without names of hosts, users or folders."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name(0)
    else:
        hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Environment(command, datetime.date.today().isoformat(), hardware, versions)


def default_device() -> torch.device:
    """The first accelerator, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

"""Where and how something was measured: the machine, the versions, the device to run on by default."""

import datetime
import os
import platform
import sys
from dataclasses import dataclass

import torch
import transformers

if sys.platform == "win32":  # where `os` does not know the load
    import psutil


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


def load_average() -> float:
    """How busy the machine was in the last minute."""
    if sys.platform == "win32":
        return round(psutil.getloadavg()[0], 1)
    return round(os.getloadavg()[0], 1)


def default_device() -> torch.device:
    """The first accelerator, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or `default_device()`.

    Raises:
        ValueError: for a device that is unknown, or that this machine does not have.
    """
    if device is None:
        return default_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(
            f"Device {str(device)!r} cannot be used here ({reason}); there is {default_device()}."
        ) from error
    return torch.device(device)

"""Processes for tests that need some: forked from a server that has imported torch and the package once.

A fresh interpreter spends seconds of CPU time on those imports, a fork milliseconds. What has to be shown from a fresh
interpreter, such as what a command imports or that a folder loads without this package, does not belong here.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from transformers.utils import logging as hf_logging

from fusedvlm.tests import fork_server

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fusedvlm.tests.trainers.smoke"])  # which imports all that trains


def start(function: Callable, *arguments: Any, environment: dict[str, str] | None = None, report: Path | None = None):
    """A process that calls a function of an importable module and leaves its result, or its traceback, in `report`."""
    process = CONTEXT.Process(target=_call, args=(function, arguments, environment or {}, report))
    process.start()
    return process


def _call(function: Callable, arguments: tuple, environment: dict[str, str], report: Path | None) -> None:
    os.environ.update({"TRANSFORMERS_VERBOSITY": "error", **environment})
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(1)
    # Data-loader workers are children of the trainer, as in any program, and notice when it dies.
    multiprocessing.set_start_method("fork", force=True)
    try:
        outcome, code = ("result", function(*arguments)), 0
    except Exception:  # noqa: BLE001 - whatever it was, the test that started this process shall show it
        outcome, code = ("traceback", traceback.format_exc()), 1
        sys.stderr.write(outcome[1])
    if report is not None:
        report.write_bytes(pickle.dumps(outcome))
    sys.exit(code)


def finish(*processes, timeout: float = 240) -> list[int]:
    """Exit codes of processes; those that hang are killed and fail the test."""
    for process in processes:
        process.join(timeout)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, f"{len(hanging)} of {len(processes)} processes hang"
    return [process.exitcode for process in processes]


@contextmanager
def rendezvous(ranks: int) -> Iterator[list[dict[str, str]]]:
    """What the environment tells each of `ranks` processes that meet over gloo.

    The store they meet at is held here, on a port that the system chose and that is taken from the first moment: a
    port that is only looked up may be somebody else's when rank 0 binds it, and launchers with heartbeats give up on a
    machine that is busy.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # nobody but us serves it
        "ACCELERATE_USE_CPU": "true",
    }
    if sys.platform == "linux":
        meeting["GLOO_SOCKET_IFNAME"] = "lo"  # needs no name of this machine that resolves
    yield [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    del store


def run_program(ranks: int, *arguments: Any) -> list[subprocess.CompletedProcess]:
    """What `torchrun --nproc-per-node=ranks` would start: a Python program on every rank, which must succeed."""
    with rendezvous(ranks) as environments:
        processes = [
            subprocess.Popen(
                [fork_server.executable(), *map(str, arguments)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for environment in environments
        ]
        with ThreadPoolExecutor(ranks) as threads:  # so that no rank waits for its output to be read
            said = list(threads.map(lambda process: process.communicate(timeout=240), processes))
    ended = [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(processes, said, strict=True)
    ]
    for rank, process in enumerate(ended):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{process.stderr[-3000:]}"
    return ended


def run_ranks(ranks: int, function: Callable, *arguments: Any) -> list[Any]:
    """What a function of an importable module returns on each of `ranks` processes; a single one is no rank of any."""
    with tempfile.TemporaryDirectory() as folder, rendezvous(ranks) as environments:
        reports = [Path(folder, str(rank)) for rank in range(ranks)]
        processes = [
            start(function, *arguments, environment=environment if ranks > 1 else None, report=report)
            for environment, report in zip(environments, reports, strict=True)
        ]
        codes = finish(*processes)
        outcomes = [pickle.loads(path.read_bytes()) if path.exists() else ("traceback", "none") for path in reports]
    wrong = [
        f"rank {rank} ended with {code}:\n{text}"
        for rank, (code, (kind, text)) in enumerate(zip(codes, outcomes, strict=True))
        if kind != "result" or code
    ]
    assert not wrong, "\n".join(wrong)
    return [result for _, result in outcomes]

"""Runs pytest in forks of a process that has imported what is slow to import and never changes.

Reads requests from standard input, one JSON object a line: `{"tests": [...], "log": path, "seconds": limit}`. Answers with
pytest's exit code a line, or `hang`. The library itself is imported by the forks, so each sees the source as it is then.
"""

import json
import os
import signal
import sys
import time

import datasets  # noqa: F401
import hypothesis  # noqa: F401
import pytest
import torch
import torchvision.transforms.v2.functional  # noqa: F401
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

torch.set_num_threads(1)


def run(request: dict) -> str:
    """One request in a fork of its own, in a process group of its own so that nothing outlives it."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--timeout", "0"]
        code = pytest.main([*options, *request["tests"]])
        sys.stdout.flush()
        os._exit(int(code))
    until = time.monotonic() + request["seconds"]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang"
        time.sleep(0.05)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    assert not any(name.partition(".")[0] == "fusedvlm" for name in sys.modules)
    print("ready", flush=True)
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)

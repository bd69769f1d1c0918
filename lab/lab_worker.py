"""One process of a lab: takes jobs that nobody else has, until none is left. Reports on standard output."""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from .lab_jobs import LabFolder
from .lab_plan import read_plan


def report(event: str, name: str, detail: str = "") -> None:
    """One line for the process that started this one."""
    sys.stdout.write(json.dumps({"event": event, "job": name, "detail": detail}) + "\n")
    sys.stdout.flush()


def work(lab: LabFolder) -> None:
    """Do jobs until all are done, waiting for those of others."""
    while lab.unfinished():
        found = lab.next_job()
        if found is None:
            time.sleep(0.5)
            continue
        job, lock = found
        try:
            report("start", job.name)
            started = time.time()
            lab.do(job)
        finally:
            lock.release()
        report("done", job.name, f"{time.time() - started:.0f} s")


def end_with(parent: int) -> None:
    """End when the process that started this one is gone: killed with signal 9 it could not say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """See `lab_run`, which starts this."""
    parser = argparse.ArgumentParser(description="Work on a lab's jobs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parent", type=int, help="End when this process is gone; it may be before this one begins.")
    options = parser.parse_args()
    if options.parent is not None:
        threading.Thread(target=end_with, args=(options.parent,), daemon=True).start()
    torch.set_num_threads(options.threads)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    work(LabFolder(read_plan(options.folder), options.folder, options.command, options.deadline, options.workers))


if __name__ == "__main__":
    main()

"""What one of torchrun's processes does, for tests that start several."""

import os
from pathlib import Path

from fusedvlm.evaluation.run_evaluation import run_evaluation
from fusedvlm.evaluation.task_options import build_tasks


def ask_one_share(folder: str) -> int:
    """Number of scores, 0 on a process that only asks."""
    os.chdir(folder)
    tasks = build_tasks(["LMUData/MMStar.tsv", "LMUData/POPE.tsv"], Path("LMUData"), max_new_tokens=4)
    done = run_evaluation("runs/quickstart", tasks, [1, 12], Path("ranks"), "test", device="cpu")
    return 0 if done is None else len(done[1])

"""The language model's pretraining in a process of its own."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from fusedvlm.console import progress

from .settings import Settings


class LanguageModelProcess:
    """Pretrain the language model in a process of its own, so that it shares the machine with the vision warm-up."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder = folder
        self.last_loss = float("nan")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.partial = partial
        command = [
            sys.executable,
            "-m",
            "fusedvlm.quickstart.language",
            "--folder",
            str(partial),
            "--steps",
            str(settings.llm_steps),
            "--seed",
            str(settings.seed),
            "--width",
            str(settings.llm_width),
            "--layers",
            str(settings.llm_layers),
        ]
        # Nothing of the folder one stands in is imported in place of a library (Python 3.11 or newer).
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONSAFEPATH": "1"}
        self.bar = progress(total=settings.llm_steps, description="language model (text)", position=1, leave=True)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.errors: list[str] = []
        self.threads = [
            threading.Thread(target=self._follow, daemon=True),
            threading.Thread(target=lambda: self.errors.extend(self.process.stderr or ()), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def _follow(self) -> None:
        for line in self.process.stdout or ():
            step, loss = line.split()
            self.last_loss = float(loss)
            self.bar.update(int(step) - self.bar.n)
            self.bar.set_postfix(loss=loss)

    def wait(self) -> float:
        """Wait until it is trained and saved; returns its last loss. Raises `RuntimeError` if it fails."""
        code = self.process.wait()
        for thread in self.threads:
            thread.join()
        self.bar.close()
        if code != 0:
            raise RuntimeError(f"Pretraining the language model failed: {''.join(self.errors[-3:]).strip()}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.rename(self.folder)
        return self.last_loss

    def stop(self) -> None:
        """End the process if it still runs."""
        self.process.kill()

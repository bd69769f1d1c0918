"""Progress of a run on standard error; transformers' own callbacks print on standard output, where results belong."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusedvlm.console import progress, say

SHOWN = (
    "loss", "grad_norm", "learning_rate", "contrastive_loss", "identity_loss", "retrieval_at_1", "eval_loss",
    "skipped_rows",
)  # fmt: skip
SILENCE = 60.0  # seconds after which a log file hears of a run again


class ConsoleCallback(TrainerCallback):
    """A bar over the steps with the time left in a terminal, lines with both in a file, and one line per log.

    Args:
        title: what is trained, e.g. `stage 2 (generation)`.
        lines: also write one line per log.
        show_bar: by default where standard error is a terminal.
    """

    def __init__(self, title: str, lines: bool = True, show_bar: bool | None = None) -> None:
        self.title, self.lines = title, lines
        self.bar: Any = None
        self.show_bar = sys.stderr.isatty() if show_bar is None else show_bar

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step the run continues from."""
        self.first_step, self.began = state.global_step, time.monotonic()
        self.said = self.began
        if state.is_world_process_zero:
            self.bar = progress(
                total=state.max_steps, initial=state.global_step, description=self.title, disable=not self.show_bar
            )
            if not self.show_bar:
                say(f"{self.title}: {state.max_steps - state.global_step} steps to go, from step {state.global_step}.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update(1)
            self._break_silence(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Steps of many micro-batches are long."""
        if self.bar is not None:
            self._break_silence(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the metrics of this log line."""
        if not state.is_world_process_zero or not logs or not self.lines:
            return
        shown = [f"{name} {logs[name]:.4g}" for name in SHOWN if isinstance(logs.get(name), int | float)]
        if not shown:
            return
        if self.bar is not None and not self.bar.disable:
            self.bar.write(f"step {state.global_step}: {', '.join(shown)}", file=self.bar.fp)
        else:
            self._say(f"{self.where(state)}: {', '.join(shown)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def where(self, state: TrainerState) -> str:
        """`step 40 of 200, 1.2 s per step, 03:12 left`."""
        done, total = state.global_step - getattr(self, "first_step", state.global_step), state.max_steps
        text = f"step {state.global_step} of {total}"
        if done <= 0 or state.global_step >= total:
            return text
        pace = (time.monotonic() - self.began) / done
        return f"{text}, {pace:.3g} s per step, {tqdm.format_interval((total - state.global_step) * pace)} left"

    def _break_silence(self, state: TrainerState) -> None:
        if self.bar.disable and self.lines and time.monotonic() - self.said >= SILENCE:
            self._say(self.where(state))

    def _say(self, line: str) -> None:
        self.said = time.monotonic()
        say(line)

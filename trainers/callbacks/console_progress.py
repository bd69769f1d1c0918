"""Progress of a run on standard error; transformers' own callbacks print on standard output, where results belong."""

from transformers import TrainerCallback

from fusedvlm.console import progress, say

SHOWN = ("loss", "grad_norm", "learning_rate", "contrastive_loss", "identity_loss", "retrieval_at_1", "eval_loss")


class ConsoleCallback(TrainerCallback):
    """A bar over the steps, and one line per log.

    Args:
        title: what is trained, e.g. `stage 2 (generation)`.
        lines: also write one line per log; the bar alone shows the newest loss.
    """

    def __init__(self, title: str, lines: bool = True):
        self.title, self.lines, self.bar = title, lines, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar at the step the run continues from."""
        if state.is_world_process_zero:
            self.bar = progress(
                total=state.max_steps, initial=state.global_step, description=self.title, disable=args.disable_tqdm
            )

    def on_step_end(self, args, state, control, **kwargs):
        """One step further."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the metrics of this log line."""
        if not state.is_world_process_zero or not logs or not self.lines:
            return
        shown = [f"{name} {logs[name]:.4g}" for name in SHOWN if isinstance(logs.get(name), int | float)]
        if not shown:
            return
        line = f"step {state.global_step}: {', '.join(shown)}"
        if self.bar is not None and not self.bar.disable:
            self.bar.write(line, file=self.bar.fp)
        else:
            say(line)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

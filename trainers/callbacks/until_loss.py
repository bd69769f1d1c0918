"""A phase that ends by its loss: a look-up is learned in one jump, and when it comes differs from seed to seed."""

from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fusedvlm.console import say
from fusedvlm.trainers.distributed import mean_over_ranks


class UntilLoss(TrainerCallback, ExportableState):
    """End training when the loss, in the mean over the last steps and over all ranks, is below a limit.

    The losses it takes the mean of are in every checkpoint (`trainer_state.json`), so a resumed run ends where the
    uninterrupted one would have.

    Args:
        trainer: whose `step_loss` holds the loss of the step so far.
        limit: of the mean.
        steps: that the mean is taken of; training goes on for at least so many.
    """

    def __init__(self, trainer: Any, limit: float, steps: int) -> None:
        self.trainer, self.limit = trainer, limit
        self.losses: deque[float] = deque(maxlen=steps)

    @property
    def mean(self) -> float | None:
        """Mean over the last steps; None before there are enough of them."""
        return sum(self.losses) / len(self.losses) if len(self.losses) == self.losses.maxlen else None

    @property
    def is_reached(self) -> bool:
        """Whether the phase is over."""
        return self.mean is not None and self.mean < self.limit

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"losses": list(self.losses)}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the losses of a checkpoint over; a new run begins without any."""
        kept: Any = state.stateful_callbacks or {}
        saved = kept.get(type(self).__name__) if state.global_step else None
        self.losses.clear()
        self.losses.extend(saved["attributes"]["losses"] if saved else [])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new sum."""
        self.trainer.step_loss = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the step's loss in, and end when the mean is low enough."""
        self.losses.append(mean_over_ranks(self.trainer.step_loss))
        if not self.is_reached:
            return
        control.should_training_stop = control.should_log = True
        control.should_save = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        if state.is_world_process_zero:
            say(
                f"The loss is {self.mean:.3f} in the mean over {len(self.losses)} steps, below {self.limit:g}: this "
                f"phase ends after {state.global_step} of at most {state.max_steps} steps."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so when the steps ran out first."""
        if not self.is_reached and state.global_step >= state.max_steps and state.is_world_process_zero:
            mean = sum(self.losses) / max(len(self.losses), 1)
            say(
                f"The loss is {mean:.3f} in the mean over the last {len(self.losses)} steps, not below until_loss="
                f"{self.limit:g}, after all {state.max_steps} steps: what follows may begin too early."
            )

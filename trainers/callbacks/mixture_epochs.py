"""A callback that lets a mixture go on from epoch to epoch."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class MixtureEpochs(TrainerCallback):
    """Tells the training mixture which epoch begins, in resumed runs too."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called by `Trainer` before it asks for the epoch's first batch."""
        dataset = getattr(train_dataloader, "dataset", None)
        if dataset is not None and hasattr(dataset, "start_epoch"):  # a mixture, or what reads through one
            dataset.start_epoch(int((state.epoch or 0) + 1e-6))  # a fraction when the run was resumed within the epoch

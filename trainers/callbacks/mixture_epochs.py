"""A callback that lets a mixture go on from epoch to epoch."""

from transformers import TrainerCallback


class MixtureEpochs(TrainerCallback):
    """Tells the training mixture which epoch begins, in resumed runs too."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        """Called by `Trainer` before it asks for the epoch's first batch."""
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "start_epoch"):  # a mixture, or what reads through one
            dataset.start_epoch(int(state.epoch + 1e-6))  # a fraction when the run was resumed within the epoch

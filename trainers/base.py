"""What both trainers share: who learns, metrics between logs, losses that must stay finite."""

from collections import defaultdict

import torch
from transformers import Trainer
from transformers.utils import logging

from .arguments import FusedVLMArguments
from .checkpoints import WholeCheckpoints
from .collators import ConversationCollator
from .parameter_groups import describe_groups, group_parameters, select_trainable

logger = logging.get_logger(__name__)


class FusedVLMTrainer(WholeCheckpoints, Trainer):
    """`transformers.Trainer` over conversations. Subclasses name their stage.

    Args:
        processing_class: the `FusedVLMProcessor`; saved with every checkpoint.
        data_collator: by default a `ConversationCollator` for the stage.
        kwargs: as in `transformers.Trainer`.

    Raises:
        ValueError: when no processor is given and no collator either.
    """

    stage: str
    _tag_names = ["fusedvlm"]

    def __init__(self, model, args: FusedVLMArguments, processing_class=None, data_collator=None, **kwargs):
        if data_collator is None:
            if processing_class is None:
                raise ValueError("Give processing_class (the FusedVLMProcessor) or a data_collator.")
            data_collator = self.default_collator(processing_class, args, model)
        self.trainable_names = select_trainable(model, self.stage, tuple(args.freeze))
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def default_collator(self, processor, args: FusedVLMArguments, model) -> ConversationCollator:
        """Collator of the stage."""
        raise NotImplementedError

    def create_optimizer(self, *args, **kwargs):
        """Optimizer over the parameters that learn, with the vision tower's own rate where one is set."""
        if self.optimizer is None:
            groups = group_parameters(
                self.model, self.args.learning_rate, self.args.weight_decay, self.args.vision_learning_rate
            )
            logger.info("Parameters that learn at stage %s:\n%s", self.stage, describe_groups(groups))
            optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimizer_kwargs.pop("lr", None)
            self.optimizer = optimizer_class(
                [
                    {"params": group.parameters, "lr": group.learning_rate, "weight_decay": group.weight_decay}
                    for group in groups
                ],
                **optimizer_kwargs,
            )
        return self.optimizer

    def record(self, **values: float | torch.Tensor) -> None:
        """Remember metrics of this step; their means are logged."""
        store = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            store[name].append(float(value.detach()) if isinstance(value, torch.Tensor) else float(value))

    def require_finite(self, loss: torch.Tensor) -> None:
        """Stop on a loss that is not finite, before it reaches the weights."""
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at step {self.state.global_step}; the weights before this step are "
                "unharmed. Lower the learning rate or look at this batch."
            )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the means of the recorded metrics."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        for name, values in self._metrics[mode].items():
            if values:
                logs[f"{prefix}{name}"] = sum(values) / len(values)
        self._metrics[mode].clear()
        super().log(logs, *args, **kwargs)

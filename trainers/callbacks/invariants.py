"""Invariants that are watched while training: what is frozen stays, what learns has gradients, and finite ones."""

from typing import Any

import torch
from accelerate import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> int:
    """Sum of a tensor's bits, read as integers: another number after nearly every change, cheap on any device."""
    local: Any = tensor
    local = local.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.detach().contiguous().flatten().view(BITS[local.element_size()]).sum())


class WeightWatch(TrainerCallback):
    """Stop when a frozen weight changed, or when something that should learn has no or non-finite gradients.

    Frozen weights are looked at every `watch_steps`, before every save and at the end; gradients in every step. Under
    DeepSpeed, which keeps gradients and partitioned weights to itself, nothing is watched.

    Args:
        trainable_names: parameters that learn.
        watch_steps: steps from one look at the frozen weights to the next.

    Raises:
        RuntimeError: in training, naming the parameters.
    """

    def __init__(self, trainable_names: list[str], watch_steps: int) -> None:
        self.trainable_names, self.watch_steps = frozenset(trainable_names), watch_steps
        self.frozen: dict[str, int] = {}
        self.is_first_step = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remember every frozen weight."""
        self.is_first_step = True
        if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
            logger.warning("DeepSpeed partitions weights and gradients: neither is watched in this run.")
            self.trainable_names, self.frozen = frozenset(), {}
            return
        self.frozen = {name: fingerprint(parameter) for name, parameter in self._frozen(model)}

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the gradients."""
        learning = [(name, p) for name, p in model.named_parameters() if _plain(name) in self.trainable_names]
        if self.is_first_step:
            without = [name for name, parameter in learning if parameter.grad is None]
            if without:
                raise RuntimeError(
                    f"{len(without)} of {len(learning)} parameters that should learn have no gradient, first "
                    f"{without[0]}: nothing in the loss depends on them."
                )
            self.is_first_step = False
        gradients = [parameter.grad for _, parameter in learning if parameter.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            broken = [n for n, p in learning if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
            where = f"in {len(broken)} parameters, first {broken[0]}" if broken else "in its norm"
            raise RuntimeError(
                f"The gradient at step {state.global_step} is not finite {where}; the weights are unharmed. Lower the "
                "learning rate."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the frozen weights from time to time, and before they would be saved."""
        if state.global_step % self.watch_steps == 0 or control.should_save:
            self._check_frozen(model, state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the frozen weights a last time."""
        self._check_frozen(model, state.global_step)

    def _frozen(self, model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in model.named_parameters() if _plain(name) not in self.trainable_names]

    def _check_frozen(self, model: torch.nn.Module, step: int) -> None:
        if not self.frozen:
            return
        changed = [name for name, p in self._frozen(model) if self.frozen.get(name) != fingerprint(p)]
        if changed:
            raise RuntimeError(
                f"{len(changed)} frozen parameters changed by step {step}, first {changed[0]}. Something outside of "
                "the trainer writes to them: an own optimizer, a callback, or another model that shares them."
            )


def _plain(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put into it."""
    return name.removeprefix("module.").replace("_orig_mod.", "")

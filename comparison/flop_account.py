"""FLOPs as they run: torch's counter over real steps, so that every connector is counted by the same ruler.

A multiply-add is two FLOPs; only matrix products, convolutions and attention count, attention as its full square.
Counting slows a step down, so each shape of batch is counted once and remembered.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode


class FlopAccount:
    """What a training has spent."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.known: dict[Hashable, float] = {}

    def run(self, shape: Hashable, work: Callable[[], Any]) -> Any:
        """Do a piece of work and book its FLOPs, counted the first time a shape is seen.

        Args:
            shape: everything the number of FLOPs depends on.
            work: forward and backward pass, without the optimizer.
        """
        if shape in self.known:
            result = work()
        else:
            with FlopCounterMode(display=False) as counter:
                result = work()
            self.known[shape] = float(counter.get_total_flops())
        self.spent += self.known[shape]
        return result


@dataclass(frozen=True)
class QuestionFlops:
    """FLOPs of one image and one question up to the first token of the answer."""

    tower: float
    connector: float
    llm: float

    @property
    def total(self) -> float:
        """Tower, connector and LLM."""
        return self.tower + self.connector + self.llm


@torch.no_grad()
def count_question(model: Any, work: Callable[[], object]) -> QuestionFlops:
    """Count one question, split by where the products stand.

    What is neither the tower's nor the LLM's is the connector's; a connector that asks the LLM about the question pays
    for it on the LLM's side.

    Args:
        model: a `FusedVLMForConditionalGeneration`.
        work: the forward pass, pixels to the logits of the first token.
    """
    with FlopCounterMode(display=False, depth=cast(int, None)) as counter:
        work()
    by_module = counter.get_flop_counts()
    root = type(model).__name__

    def of(*names: str) -> float:
        return float(sum(sum(by_module.get(f"{root}.{name}", {}).values()) for name in names))

    tower, llm = of("model.vision_tower"), of("model.language_model", "lm_head")
    return QuestionFlops(tower, float(counter.get_total_flops()) - tower - llm, llm)

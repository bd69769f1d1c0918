"""Rows that could not be trained on: counted, named, written down, and limited."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed import ReduceOp
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusedvlm.console import say
from fusedvlm.trainers.distributed import reduced

SHOWN = 5
HOPELESS = 8  # rows skipped before the first good one


class SkippedRows(TrainerCallback):
    """Keeps count of skipped rows, each once however often an epoch shows it again.

    Args:
        folder: gets `skipped_rows.jsonl` with id, source, reason and detail of each.
        limit: most rows that may be skipped, by all processes together; 0 lets the first one end the run.
        rank: of this process; other files than the first's are numbered.
    """

    def __init__(self, folder: str | Path, limit: int, rank: int = 0) -> None:
        self.path = Path(folder) / f"skipped_rows{f'_rank{rank}' if rank else ''}.jsonl"
        self.limit = limit
        self.rows: dict[str, str] = {}  # id to reason
        self.kept = 0
        self._by_others: dict[str, str] = {}  # as far as the processes have told each other
        self._untold: dict[str, str] = {}

    @property
    def of_all(self) -> dict[str, str]:
        """Rows that any process skipped, up to the end of the last step: id to reason."""
        return {**self._by_others, **self.rows}

    @property
    def reasons(self) -> Counter:
        """How many rows were skipped for each reason, by all processes."""
        return Counter(self.of_all.values())

    def count(self, kept: int, skipped: list[dict[str, Any]]) -> None:
        """Take note of a batch.

        Args:
            kept: its rows that are trained on.
            skipped: its others, as `ConversationCollator` lists them.

        Raises:
            ValueError: beyond the limit, and when nothing can be trained on, with the reasons.
        """
        self.kept += kept
        new = [entry for entry in skipped if entry["id"] not in self.rows]
        for entry in new:
            self.rows[entry["id"]] = self._untold[entry["id"]] = entry["reason"]
            if len(self.rows) <= SHOWN:
                say(f"Skipped {entry['id']}: {entry['reason']}: {entry['detail'][:200]}")
            elif len(self.rows) == SHOWN + 1:
                say(f"Further skipped rows are listed in {self.path}.")
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new)
        if new:
            self._check_limit(self.rows)
        if skipped and not self.kept and len(self.rows) >= HOPELESS:
            self.refuse_nothing()

    def tell_all(self, device: torch.device) -> None:
        """Count the rows of all processes together. All of them must call it at the same place.

        A row that several of them met, in different epochs, is one row, so names are exchanged; but only when somebody
        has new ones, which a sum of one number says.

        Raises:
            ValueError: on every process, beyond the limit.
        """
        if not reduced(len(self._untold), ReduceOp.SUM, device):
            return
        for untold in gather_object([self._untold]):
            self._by_others.update(untold)
        self._untold = {}
        self._check_limit(self.of_all)

    def _check_limit(self, rows: dict[str, str]) -> None:
        if len(rows) > self.limit:
            last = next(reversed(rows))[-60:]
            raise ValueError(
                f"{len(rows)} rows cannot be trained on, more than max_skipped_rows={self.limit}: "
                f"{self.describe()[:120]}; the last is {last}. `fusedvlm data check` finds them all."
            )

    def refuse_nothing(self) -> None:
        """Stop a run in which every row was skipped.

        Raises:
            ValueError: with the reasons.
        """
        if self.rows and not self.kept:
            raise ValueError(
                f"None of {len(self.rows)} rows could be trained on: {self.describe()[:140]}. They are listed in "
                f"{self.path.name}; `fusedvlm data check` says more."
            )

    def describe(self) -> str:
        """`3 too long, 1 empty question`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"rows": dict(self.rows), "kept": self.kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.rows, self.kept = dict(state["rows"]), state["kept"]
        self._untold = dict(self.rows)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hold the limit against what all processes skipped."""
        if args.world_size > 1:
            self.tell_all(args.device)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many there were; a run without a single good row is none."""
        self.refuse_nothing()
        if args.process_index == 0 and (skipped := self.of_all):
            listed = self.path if args.world_size == 1 else self.path.with_name("skipped_rows*.jsonl")
            say(f"{len(skipped)} rows were skipped ({self.describe()}); they are listed in {listed}.")

"""The whole comparison: train what is missing, measure what is missing, skip what is there."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from fusedvlm.console import progress, say
from fusedvlm.files import write_atomically

from .cells import Cell, claim_folder
from .conversations import Batches
from .entrants import Entrant, build_model, supported_counts, training_jobs
from .equal_training import TrainingRecord, freeze, train_equally
from .measuring import measure_cell
from .plan import Plan
from .shared_world import SharedWorld, open_world


class Comparison:
    """One run folder: `plan.json`, `world/`, `weights/`, `cells/`.

    Several processes may work in the same folder: each job is locked by whoever does it.

    Args:
        plan: sizes and budget.
        folder: the run folder.
        command: what the user typed, for the record.

    Raises:
        ValueError: when the folder holds a comparison with other settings.
    """

    def __init__(self, plan: Plan, folder: Path, command: str) -> None:
        claim_folder(folder, plan)
        self.plan, self.folder, self.command = plan, folder, command
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._shared: SharedWorld | None = None

    @property
    def shared(self) -> SharedWorld:
        """What all entrants share, built on first use."""
        if self._shared is None:
            with FileLock(self.folder / "world.lock"):
                self._shared = open_world(self.plan, self.folder / "world", self.device)
        return self._shared

    def cell_path(self, entrant: Entrant, m: int, seed: int) -> Path:
        """File of one cell."""
        return self.folder / "cells" / f"{entrant.slug}-m{m}-s{seed}.json"

    def cells(self, entrants: Sequence[Entrant] | None = None) -> list[Cell]:
        """Finished cells, of some entrants or of all that the folder has."""
        found = [Cell.load(path) for path in sorted((self.folder / "cells").glob("*.json"))]
        wanted = None if entrants is None else {entrant.key for entrant in entrants}
        return [cell for cell in found if wanted is None or cell.entrant in wanted]

    def jobs(self, entrants: Sequence[Entrant], seeds: int) -> list[tuple[Entrant, tuple[int, ...], list[int], int]]:
        """(entrant, m its weights are for, m to measure with them, seed), in the order of work: seed after seed."""
        jobs = []
        for seed in range(seeds):
            for entrant in entrants:
                counts, _ = supported_counts(entrant, self.plan)
                for weights in training_jobs(entrant, self.plan, counts):
                    jobs.append((entrant, weights, counts if entrant.reducer else list(weights), seed))
        return jobs

    def run(self, entrants: Sequence[Entrant], seeds: int) -> list[Cell]:
        """Do what is missing; returns the cells of these entrants and seeds.

        Raises:
            ValueError: when an entrant can give none of the plan's m, or a training fails.
        """
        jobs = self.jobs(entrants, seeds)
        total = sum(len(counts) for _, _, counts, _ in jobs)
        with contextlib.closing(progress(total=total, description="cells")) as bar:
            waiting = [job for job in jobs if not self._work(job, bar, wait=False)]
            if waiting:
                say(f"Waiting for {len(waiting)} jobs of another process in {self.folder}.")
            for job in waiting:
                self._work(job, bar, wait=True)
        return [cell for cell in self.cells(entrants) if cell.seed < seeds]

    def _work(self, job: Any, bar: Any, wait: bool) -> bool:
        """Do one job unless another process is doing it; whether it is done."""
        entrant, weights, counts, seed = job
        if self._missing(entrant, counts, seed):
            lock = FileLock(self.folder / f"{entrant.trained.slug}-m{max(weights)}-s{seed}.lock")
            try:
                with lock.acquire(timeout=-1 if wait else 0):
                    self._measure(entrant, weights, self._missing(entrant, counts, seed), seed, bar)
            except Timeout:
                return False
        bar.update(len(counts))
        return True

    def _missing(self, entrant: Entrant, counts: Sequence[int], seed: int) -> list[int]:
        paths = {m: self.cell_path(entrant, m, seed) for m in counts}
        for path in filter(Path.exists, paths.values()):
            Cell.load(path)
        return [m for m, path in paths.items() if not path.exists()]

    def _measure(self, entrant: Entrant, weights: tuple[int, ...], counts: list[int], seed: int, bar: Any) -> None:
        if not counts:
            return
        bar.set_postfix_str(f"{entrant.key}, seed {seed}")
        model, processor = build_model(entrant.trained, self.shared, self.plan, weights, seed)
        model.to(self.device)
        training = self._train(entrant.trained, model, weights, seed)
        for m in counts:
            cell = measure_cell(entrant, model, processor, self.shared, self.plan, m, seed, training, self.command)
            cell.save(self.cell_path(entrant, m, seed))

    def _train(self, entrant: Entrant, model: Any, weights: tuple[int, ...], seed: int) -> TrainingRecord:
        """Train, or read the weights of a finished training; a killed one left nothing."""
        stem = self.folder / "weights" / f"{entrant.slug}-m{'_'.join(map(str, weights))}-s{seed}"
        stem.parent.mkdir(exist_ok=True)
        record, tensors = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")
        freeze(model)
        learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if record.exists():
            result = model.load_state_dict(load_file(tensors), strict=False)
            if result.unexpected_keys or learned & set(result.missing_keys):
                raise ValueError(f"{tensors} does not fit {entrant.key}; delete it and run again.")
            return TrainingRecord(**json.loads(record.read_text(encoding="utf-8")))
        batches = Batches(
            self.shared.tokenizer,
            self.shared.view_tokens(model, "training"),
            model.config.image_token_id,
            self.device,
            reads_question=bool(model.config.fuse_question),
        )
        training = train_equally(
            model, batches, self.shared.samples, self.plan, weights, seed, f"training {entrant.key}, seed {seed}"
        )
        partial = tensors.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in model.state_dict().items() if name in learned}, partial)
        partial.rename(tensors)
        write_atomically(record, json.dumps(training.record()))  # last: it says that the weights are whole
        return training


def refused_counts(entrants: Sequence[Entrant], plan: Plan) -> Iterator[tuple[Entrant, int, str]]:
    """Every (entrant, m, reason) of a plan that cannot be."""
    for entrant in entrants:
        for m, reason in supported_counts(entrant, plan)[1].items():
            yield entrant, m, reason

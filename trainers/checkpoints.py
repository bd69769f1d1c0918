"""Checkpoints that are whole or not there.

A checkpoint is written under `<output_dir>/.incomplete/`, gets a marker with every file's size and SHA-256, and is then
renamed to `checkpoint-<step>`. Whoever is killed on the way leaves nothing that looks like a checkpoint, and a folder
whose files do not match its marker (a full disk, a broken copy) is reported and passed over.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from fusedvlm.files import read_json, saying_when_full, sha256_of, sync, write_atomically
from fusedvlm.trainers.callbacks.until_loss import UntilLoss

from .interruption import (
    StopAtBoundary,
    StopSignals,
    TrainingInterrupted,
    begin_worker,
    name_of,
    random_states,
    with_random_states,
    worker_context,
)

logger = logging.get_logger(__name__)

MARKER = "complete.json"
STAGING = ".incomplete"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOGGING_STATE = "logging_state_{rank}.pt"
# {part: patterns, one of which must be in a checkpoint that training continues from}
PARTS = {
    "model": ("*.safetensors", "pytorch_model*", "global_step*"),
    "configuration": ("config.json", "adapter_config.json"),
    "processor": ("processor_config.json",),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
    "trainer state": ("trainer_state.json",),
}


def mark_complete(folder: Path) -> None:
    """Write the marker of a folder whose files are all there, and force them to disk.

    The marker: `{"files": {relative path: {"bytes": int, "sha256": str}}}`.
    """
    files = {}
    for path in _files(folder):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        sync(path)
    write_atomically(folder / MARKER, json.dumps({"files": files}, indent=1, sort_keys=True))
    sync(folder)


def problems(folder: Path, contents: bool = True) -> list[str]:
    """What is wrong with a marked folder; empty when it is whole.

    Args:
        folder: a checkpoint, or a finished variant.
        contents: read every file and compare its hash, not only its size.
    """
    marker = folder / MARKER
    if not marker.is_file():
        return [f"it has no {MARKER}, so it was not written to its end"]
    try:
        files = read_json(marker)["files"]
    except (ValueError, KeyError):
        return [f"its {MARKER} is damaged"]
    found = []
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}")
        elif contents and sha256_of(path) != facts["sha256"]:
            found.append(f"{name} was changed (its hash differs)")
    return found


def find_last_checkpoint(output_dir: str | Path, report: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are reported and passed over. None when there is none."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        wrong = problems(folder)
        if not wrong:
            return folder
        report(f"{folder} is passed over: {'; '.join(wrong[:3])}.")
    return None


def require_complete(folder: str | Path) -> Path:
    """The folder, or a `ValueError` that says what is wrong with it as a checkpoint."""
    folder = Path(folder)
    wrong = problems(folder) if folder.is_dir() else ["there is no such folder"]
    if wrong:
        raise ValueError(f"{folder} is not a whole checkpoint: {'; '.join(wrong[:3])}. Give another, or none.")
    return folder


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target`, with a marker, only when the block ends well."""
    staging = target.parent / STAGING / target.name
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    mark_complete(staging)
    publish(staging, target)


def publish(staging: Path, target: Path) -> None:
    """Rename a complete folder to its name; an older one of that name is moved aside first and then removed."""
    old = staging.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    if not any(staging.parent.iterdir()):
        staging.parent.rmdir()


if TYPE_CHECKING:  # a mixin in front of transformers' Trainer
    Base = Trainer
else:
    Base = object


class AtomicCheckpoints(Base):
    """Mixin in front of `transformers.Trainer`: its checkpoints appear under their name when they are whole.

    What was summed up for the next log line is saved too, so that a resumed run logs the same means. SIGTERM and SIGINT
    end training with a checkpoint of the last whole step and `TrainingInterrupted`, unless `save_strategy` is "no".
    """

    until_loss: UntilLoss | None = None
    stopped_by = 0  # the signal that ended the last training
    _staging: Path | None = None
    _is_resuming_from: Path | None = None
    _first_step = 0  # where the last training began
    _saved_step: int | None = None
    _is_within_step = False  # stopped between two micro-batches: what is saved is the step before
    skipped: Any
    _metrics: dict[str, dict[str, list]]
    _boundary: dict | None = None  # generators and sums at the end of the last whole step

    def train(  # type: ignore[override]  # what is left of the arguments goes by name
        self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As `Trainer.train`; True resumes from the newest whole checkpoint, and a damaged one is refused.

        Raises:
            ValueError: when the checkpoint asked for is damaged, or True finds none.
            TrainingInterrupted: after SIGTERM or SIGINT; what was learned is in a checkpoint by then.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
        elif resume_from_checkpoint:
            require_complete(resume_from_checkpoint)
        self._is_resuming_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.stopped_by, self._saved_step, self._is_within_step, self._boundary = 0, None, False, None
        path = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._is_resuming_from is not None:
            self.prepare_to_resume(self._is_resuming_from)
        restore, stop = _RestoreLogging(self), StopSignals()
        self.add_callback(restore)
        try:
            if self.args.save_strategy == SaveStrategy.NO:  # nothing to wait for
                return super().train(resume_from_checkpoint=path, **kwargs)
            with stop:
                result = self._train_until_stopped(stop, path, kwargs)
        finally:
            self.remove_callback(restore)
        if self.stopped_by:
            raise TrainingInterrupted(self.stopped_by, self._describe_stop())
        return result

    def prepare_to_resume(self, checkpoint: Path) -> None:
        """What has to be as it was when the checkpoint was written and is not restored with its weights."""

    def _train_until_stopped(self, stop: StopSignals, path: str | None, kwargs: dict) -> TrainOutput:
        callback = StopAtBoundary(self, stop)
        # First of all callbacks, so that those that look before a save know of it.
        self.callback_handler.callbacks.insert(0, callback)
        try:
            with stop.deferred():
                return super().train(resume_from_checkpoint=path, **kwargs)
        except RuntimeError as error:
            if not (stop.received and "DataLoader worker" in str(error)):
                raise
            self.stopped_by = stop.received
            raise TrainingInterrupted(stop.received, self._describe_stop()) from error
        finally:
            self.callback_handler.callbacks.remove(callback)

    def _describe_stop(self) -> str:
        step, last = self.state.global_step, self._saved_step
        where = f"{name_of(self.stopped_by)} ended training after step {step} of {self.state.max_steps}"
        if last is None and self._is_resuming_from is not None:
            saved = f"{self._is_resuming_from.name}, from which it had continued, is the last checkpoint"
        elif last is None and step > self._first_step:
            saved = "a worker that reads data ended with it, before a checkpoint could be written"
        elif last is None:
            saved = "no step was complete, so there is nothing to save"
        else:
            saved = f"checkpoint-{last} in {self.args.output_dir} is whole"
        return f"{where}: {saved}. It is not finished and nothing was published; the same command goes on."

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; its workers outlive a signal that goes to the whole process group."""
        return outliving_signals(super()._get_dataloader(*args, **kwargs))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer`'s, which takes one step too many when the checkpoint is already that of the last step."""
        is_over = self.until_loss is not None and self.until_loss.is_reached
        if is_over or self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.stopped_by:
            self.control.should_evaluate = False  # whoever sent the signal will not wait for it
            self.control.should_log = self.control.should_log and not self._is_within_step
            saved = self._first_step if self._saved_step is None else self._saved_step
            self.control.should_save = self.state.global_step > saved
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.args.gradient_accumulation_steps > 1 and not self._is_within_step:
            self._boundary = {"random": random_states(), "sums": self._logging_sums()}

    def _save_rng_state(self, output_dir: str) -> None:
        if not self._is_within_step or self._boundary is None:
            super()._save_rng_state(output_dir)
            return
        with with_random_states(self._boundary["random"]):
            super()._save_rng_state(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, which writes shards only in a sharded run: whole weights are gathered and written
        beside them, so that every checkpoint loads with `from_pretrained`."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or "SHARDED_STATE_DICT" not in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
            return
        state_dict = self.accelerator.get_state_dict(self.model)  # a collective: every rank calls it
        if self.args.should_save:
            with _own_class(self.model):
                self._save(output_dir, state_dict=state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own saving, under a temporary name, then checked, marked and renamed."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        try:
            with saying_when_full(run_dir, f"{name} was not written; free some space and start the command again."):
                self._save_whole(model, trial, run_dir, name)
        except OSError:
            shutil.rmtree(run_dir / STAGING / name, ignore_errors=True)  # half a checkpoint only takes up space
            raise

    def _save_whole(self, model: Any, trial: Any, run_dir: Path, name: str) -> None:
        staging = run_dir / STAGING
        if self.args.should_save:
            shutil.rmtree(staging / name, ignore_errors=True)  # what a killed run left
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self._save_logging_state(staging / name)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._name_best_checkpoint(run_dir, staging / name)
            if not self.args.save_only_model:
                _require_parts(staging / name, self.processing_class is not None)
            mark_complete(staging / name)
            publish(staging / name, run_dir / name)
        self._saved_step = self.state.global_step
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not yet: the folder is renamed first."""

    def _name_best_checkpoint(self, run_dir: Path, folder: Path) -> None:
        """Trainer looked for the best checkpoint beside the one being written; it lies beside the finished ones."""
        if not self.state.best_global_step:
            return
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir() or best.name == folder.name:
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _save_logging_state(self, folder: Path) -> None:
        if self.args.save_only_model:
            return
        state = self._boundary["sums"] if self._is_within_step and self._boundary else self._logging_sums()
        torch.save(state, folder / LOGGING_STATE.format(rank=self.args.process_index))

    def _logging_sums(self) -> dict:
        return {
            "loss": self._tr_loss.detach().clone(),
            "last_logged": self._globalstep_last_logged,
            "metrics": {mode: dict(values) for mode, values in self._metrics.items()},
            "skipped": self.skipped.state(),
        }

    def restore_logging_state(self) -> None:
        """Continue the sums of the log line that was under way when the checkpoint was written."""
        if self._is_resuming_from is None:
            return
        path = self._is_resuming_from / LOGGING_STATE.format(rank=self.args.process_index)
        if not path.is_file():  # another number of processes, or weights only
            return
        # Via the CPU: with several processes on it the device is called cpu:0, which torch cannot load to.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._tr_loss, self._globalstep_last_logged = state["loss"].to(self.args.device), state["last_logged"]
        if "skipped" in state:  # checkpoints of 0.1 counted no rows
            self.skipped.load_state(state["skipped"])
        for mode, values in state["metrics"].items():
            self._metrics[mode].update(
                {
                    name: [part.to(self.args.device) if isinstance(part, torch.Tensor) else part for part in pair]
                    for name, pair in values.items()
                }
            )


def outliving_signals(loader: Any) -> Any:
    """A data loader whose workers outlive a signal that goes to the whole process group."""
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = partial(begin_worker, inner.worker_init_fn)
    if inner.num_workers > 0:
        inner.multiprocessing_context = inner.multiprocessing_context or worker_context()
    return loader


class _RestoreLogging(TrainerCallback):
    """Trainer resets its sums when training begins; this is the first moment after that."""

    def __init__(self, trainer: AtomicCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the sums back."""
        self.trainer.restore_logging_state()


@contextmanager
def _own_class(model: Any) -> Iterator[None]:
    """A sharded module under its own class: sharding gives it one from torch, whose code would be saved as remote code
    and whose name would be written into the config."""
    sharded = type(model)
    model.__class__ = next(kind for kind in sharded.__mro__ if kind.__module__ == sharded.__bases__[-1].__module__)
    try:
        yield
    finally:
        model.__class__ = sharded


def _require_parts(folder: Path, with_processor: bool) -> None:
    missing = [
        part
        for part, patterns in PARTS.items()
        if not any(True for pattern in patterns for _ in folder.glob(pattern))
        and (with_processor or part != "processor")
    ]
    if missing:
        raise RuntimeError(f"The checkpoint {folder.name} was written without its {', '.join(missing)}.")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)

"""One stage of training from a plan: data, model, trainer, checkpoint to go on from, the finished folder."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from fusedvlm.console import say
from fusedvlm.files import saying_when_full
from fusedvlm.trainers.base import FusedVLMTrainer
from fusedvlm.trainers.callbacks.console_progress import ConsoleCallback
from fusedvlm.trainers.callbacks.mixture_epochs import MixtureEpochs
from fusedvlm.trainers.checkpoints import (
    STAGING,
    find_last_checkpoint,
    mark_complete,
    problems,
    publish,
    require_complete,
)
from fusedvlm.trainers.contrastive import ContrastiveTrainer
from fusedvlm.trainers.generation import GenerationTrainer
from fusedvlm.trainers.interruption import StopSignals
from fusedvlm.trainers.parameter_groups import describe_groups, group_parameters
from fusedvlm.trainers.recipes.recipe_parsing import RunPlan, world_size

from .build_model import build_model_and_processor, complete_on_every_rank
from .run_record import changes, describe_run, read_record, write_record
from .training_data import data_changes, data_manifest, open_datasets

if TYPE_CHECKING:
    from fusedvlm.processing import FusedVLMProcessor


def train_stage(plan: RunPlan, work: Path, target: Path, title: str, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train one model to the end and publish it as `target`; a finished one is left as it is.

    Args:
        plan: typed arguments.
        work: folder of checkpoints and of `run.json`.
        target: folder of the finished model.
        title: for the progress bar.
        callbacks: further trainer callbacks.
    """
    stage = "contrastive" if plan.recipe.stage == "contrastive" else "generation"
    train_data, eval_data = open_datasets(plan.data)
    if not hasattr(train_data, "__len__") and plan.training.max_steps <= 0:
        raise ValueError("Streamed sources have no length: say with training.max_steps how many steps to train.")
    record = describe_run(plan.recipe, data_manifest(plan.data, train_data), world_size())
    if target.is_dir() and not problems(target, contents=False):
        _compare(plan, work, record)
        tell(f"{target} is finished; nothing to do.")
        return target
    checkpoint = choose_checkpoint(plan, work, record)
    if PartialState().is_main_process:
        write_record(work, record)
    training = replace_output(plan.training, work)
    model, processor = build_model_and_processor(plan.model, stage, work, training.seed)
    trainer = make_trainer(plan, stage, training, model, processor, train_data, eval_data)
    tell(f"{title}: parameters that learn\n{describe_learning(trainer)}")
    # transformers sets disable_tqdm by its verbosity; what counts here is what the recipe says.
    is_off = str(plan.recipe.sections.get("training", {}).get("disable_tqdm")).lower() == "true"
    trainer.add_callback(ConsoleCallback(title, show_bar=False if is_off else None))
    for callback in callbacks:
        trainer.add_callback(callback)
    if checkpoint is not None:
        tell(f"Resuming from {checkpoint}.")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    is_over = trainer.until_loss is not None and trainer.until_loss.is_reached
    require_last_step(trainer.state, is_told=bool(callbacks) or is_over)
    with StopSignals(f"the run when {target} was finished") as stop, stop.deferred():
        trainer.save_state()
        record["skipped_rows"] = dict(sorted(trainer.skipped.reasons.items()))
        record["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        save_finished(trainer, target, record)
        if PartialState().is_main_process:
            write_record(work, record)
    stop.raise_received()
    return target


def require_last_step(state: TrainerState, is_told: bool) -> None:
    """Refuse to publish what did not reach its last step.

    Args:
        state: after training.
        is_told: whether callbacks of the caller's own may have ended it, which is then their decision.

    Raises:
        RuntimeError: naming both steps.
    """
    if state.global_step < state.max_steps and not is_told:
        raise RuntimeError(
            f"Training ended at step {state.global_step} of {state.max_steps}: the data ran out. Nothing was published."
        )


def make_trainer(
    plan: RunPlan,
    stage: str,
    training: Any,
    model: Any,
    processor: "FusedVLMProcessor",
    train_data: Any,
    eval_data: Any = None,
) -> FusedVLMTrainer:
    """The stage's trainer, its modules compiled where asked for, quiet on standard output."""
    compile_modules(model, plan.run.torch_compile_modules or [], plan.run.torch_compile_modules_backend)
    kind = ContrastiveTrainer if stage == "contrastive" else GenerationTrainer
    trainer = kind(
        model=model, args=training, train_dataset=train_data, eval_dataset=eval_data, processing_class=processor,
        callbacks=[MixtureEpochs()],
    )  # fmt: skip
    with complete_on_every_rank():
        trainer.throughput.shapes  # noqa: B018 - counted on a model without memory, which ZeRO-3 would try to split
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if stage == "contrastive" and training.gradient_accumulation_steps > 1:
        pairs = training.per_device_train_batch_size * training.world_size
        tell(
            f"Stage 1 compares the {pairs} samples of a micro-batch with each other, not the {pairs} x "
            f"{training.gradient_accumulation_steps} of a step: more processes or larger batches give more negatives."
        )
    return trainer


def describe_learning(trainer: Any) -> str:
    """Who learns and how fast, one line per parameter group."""
    args = trainer.args
    return describe_groups(
        group_parameters(trainer.model, args.learning_rate, args.weight_decay, args.vision_learning_rate)
    )


def compile_modules(model: Any, names: Sequence[str], backend: str) -> None:
    """Compile submodules in place; parameter names stay as they are.

    Raises:
        ValueError: for a module that does not exist.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            top = sorted(key for key in modules if key.count(".") <= 1 and key)
            raise ValueError(f"run.torch_compile_modules: no module {name!r}; there are {', '.join(top)}.")
        modules[name].compile(backend=backend)


def choose_checkpoint(plan: RunPlan, work: Path, record: dict) -> Path | None:
    """What to continue from.

    Raises:
        ValueError: when the folder holds a run with other settings, or `never` finds one, or the path is damaged.
    """
    resume = plan.run.resume
    if resume not in ("auto", "never"):
        return require_complete(resume)
    checkpoint = find_last_checkpoint(work, report=tell)
    if checkpoint is None:
        return None
    if resume == "never":
        raise ValueError(f"{work} holds {checkpoint.name} of an earlier run; give another output_dir or delete it.")
    _compare(plan, work, record)
    return checkpoint


def save_finished(trainer: Any, target: Path, record: dict) -> None:
    """Save the model and processor as a folder that appears when it is whole. Every rank must call this."""
    staging = target.parent / STAGING / target.name
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with saying_when_full(target.parent, f"{target.name} was not written; the checkpoints are whole, start again."):
        trainer.save_model(str(staging), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            write_record(staging, record)
            mark_complete(staging)
            publish(staging, target)
    trainer.accelerator.wait_for_everyone()


def replace_output(training: Any, output_dir: Path) -> Any:
    """Training arguments with another output folder."""
    if Path(training.output_dir) == output_dir:
        return training
    return replace(training, output_dir=str(output_dir))


def _compare(plan: RunPlan, work: Path, record: dict) -> None:
    earlier = read_record(work)
    if earlier is None:
        return
    different = changes(earlier["recipe"], record["recipe"])
    if not any(name.startswith("data.") for name in different):
        different += data_changes(earlier["data"], record["data"])
    if different:
        raise ValueError(
            f"{work} holds a run with other settings ({'; '.join(different[:3])[:160]}). Give another output_dir, or "
            "continue it with the new settings by naming its checkpoint: --run.resume PATH."
        )


def tell(message: str) -> None:
    """Say something once, not on every process."""
    if PartialState().is_main_process:
        say(message)

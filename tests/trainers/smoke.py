"""Small runs of recipes in processes of their own, for tests of killing, resuming and distribution.

Children start in milliseconds (see `fusedvlm.tests.processes`) and can be killed with signal 9 like any process.
"""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from fusedvlm.quickstart.world import make_sample
from fusedvlm.tests import processes
from fusedvlm.tests.processes import finish
from fusedvlm.trainers import checkpoints
from fusedvlm.trainers.recipes.recipe_files import Recipe, load_recipe, merge
from fusedvlm.trainers.runs.run_recipe import run_recipe

KILLED = -signal.SIGKILL


def write_data(folder: Path, count: int = 12, text_only: tuple[int, ...] = (), turns: int | None = None) -> Path:
    """A chat-format JSONL file about pictures of the quickstart's world; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        picture = make_sample(0, number)
        picture.image.save(folder / f"{number}.png")
        questions = picture.draw_questions(np.random.default_rng(number), turns or 1 + number % 2, dense=False)
        messages = []
        for turn, question in enumerate(questions):
            shown = [{"type": "image"}] if turn == 0 and number not in text_only else []
            messages += [
                {"role": "user", "content": [*shown, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ]
        images = [] if number in text_only else [str(folder / f"{number}.png")]
        rows.append({"images": images, "messages": messages})
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def smoke_recipe(stage: str, output_dir: Path, data: Path, **sections) -> Recipe:
    """The smoke preset of a stage on a data file, with further settings by section."""
    name = "elastic" if stage == "elastic" else stage
    recipe = load_recipe(name, preset="cpu_smoke")
    own = {
        "data": {"sources": [{"type": "chat", "path": str(data)}]},
        "training": {"output_dir": str(output_dir), "disable_tqdm": True},
    }
    recipe.sections = merge(merge(recipe.sections, own), sections)
    return recipe


class KillAt(TrainerCallback):
    """Signal 9 to this very process at the end of a step; at the n-th run when a ladder has several."""

    def __init__(self, step: int, run: int = 0):
        self.step, self.run, self.runs = step, run, -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.runs += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.runs == self.run and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalAt(TrainerCallback):
    """Signals to this very process at one of the trainer's events of a step."""

    def __init__(self, event: str, step: int, signals=(signal.SIGTERM,), run: int = 0):
        self.step, self.signals, self.run, self.runs = step, signals, run, -1
        setattr(self, event, self.send)

    def on_train_begin(self, args, state, control, **kwargs):
        self.runs += 1

    def send(self, args, state, control, **kwargs):
        if self.runs == self.run and state.global_step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


class OnRank:
    """A callback for one rank of several only."""

    def __init__(self, rank: int, callback: TrainerCallback):
        self.rank, self.callback = rank, callback


class KillInSave:
    """Signal 9 while the second checkpoint is being written, at the call of one of the functions that write it."""

    def __init__(self, moment: str):
        self.moment = moment

    def __call__(self) -> None:
        owner = Trainer if self.moment == "optimizer" else checkpoints
        name = "_save_optimizer_and_scheduler" if self.moment == "optimizer" else self.moment
        original = getattr(owner, name)
        calls = []

        def wrapper(*args, **kwargs):
            # Any call for something else than a checkpoint does not count.
            if not any("checkpoint-" in str(argument) for argument in args):
                return original(*args, **kwargs)
            calls.append(1)
            if len(calls) == 2:
                if self.moment == "optimizer":
                    (Path(args[1]) / "optimizer.pt").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,CLIPEncoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_CPU": "false",
}


def zero(stage: int) -> dict[str, str]:
    """What accelerate launch tells the processes of `zero<stage>.yaml`, for DeepSpeed on the CPU."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_CPU": "false",
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",
    }


class PretendGpu:
    """accelerate shards on accelerators only; torch itself shards over gloo. Its processes are told they have a GPU."""

    def __init__(self, kill=None):
        self.kill = kill

    def __call__(self) -> None:
        from accelerate import DistributedType, PartialState

        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def _train(recipe: Recipe, kill) -> None:
    callbacks = []
    if isinstance(kill, PretendGpu):
        kill()
        kill = kill.kill
    if isinstance(kill, OnRank):
        callbacks += [kill.callback] if int(os.environ["RANK"]) == kill.rank else []
    elif isinstance(kill, TrainerCallback):
        callbacks.append(kill)
    elif kill is not None:
        kill()
    run_recipe(recipe, callbacks=callbacks)


def start(recipe: Recipe, kill=None, environment: dict[str, str] | None = None):
    """A process that trains a recipe. `kill`: a `KillAt`, or a function that arranges the death."""
    return processes.start(_train, recipe, kill, environment=environment)


def run(recipe: Recipe, kill=None) -> int:
    """Exit code of one process that trains a recipe."""
    return finish(start(recipe, kill))[0]


def run_ranks(ranks: int, recipe: Recipe, kill=None, environment: dict[str, str] | None = None) -> list[int]:
    """Exit codes of `ranks` processes that train one recipe together over gloo."""
    with processes.rendezvous(ranks) as environments:
        return finish(*(start(recipe, kill, {**own, **(environment or {})}) for own in environments))


def trajectory(work: Path) -> list[dict]:
    """What a finished run logged at each step, without timings."""
    rows = json.loads((work / "trainer_state.json").read_text())["log_history"]
    keep = ("loss", "grad_norm", "learning_rate", "epoch", "step", "contrastive_loss", "identity_loss")
    return [
        {name: value for name, value in row.items() if name in keep or name.startswith("loss_m_")}
        for row in rows
        if "loss" in row
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_same_weights(one: Path, other: Path) -> None:
    """Two saved models agree in every bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def random_step(seed: str, last: int) -> int:
    """A step between 1 and the last but one, the same in every run of the test."""
    return random.Random(seed).randint(1, last - 1)

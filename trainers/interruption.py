"""Preempted runs: SIGTERM and SIGINT finish what is under way, save a whole checkpoint, and end the run unfinished.

While a step is computed or a checkpoint is written the signal is only remembered, so that neither is torn. All ranks of
a run stop at the same place, whichever of them got the signal.
"""

import copy
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.distributed import ReduceOp
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .distributed import reduced

WATCHED = (signal.SIGTERM, signal.SIGINT)
SECOND_THOUGHTS = 2.0  # seconds: a launcher passes a Ctrl-C on that the terminal has sent already
GRACE = 60.0  # seconds that data-loader workers outlive a signal, for the step that is being finished


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the run before its last step. `exit_code` is the shell's: 143 for SIGTERM, 130 for SIGINT."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """SIGTERM and SIGINT as `TrainingInterrupted`: at once, or remembered inside `deferred()`.

    A second Ctrl-C does not wait any longer. SIGTERM stays ignored where the surroundings ignore it; SIGINT does not,
    because shells let every background job of a script ignore it. Threads, which cannot have handlers of their own,
    leave everything as it is.

    Args:
        what: what the signal ends, for the message.
    """

    def __init__(self, what: str = "training") -> None:
        self.what = what
        self.received = 0
        self._at = 0.0
        self._deferring = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember what comes inside the block; whoever opened it looks at `received`."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1

    def raise_received(self) -> None:
        """Raise for a signal that was remembered."""
        if self.received:
            raise TrainingInterrupted(self.received, f"{name_of(self.received)} stopped {self.what}.")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_again = signum == signal.SIGINT and self.received == signum and now - self._at > SECOND_THOUGHTS
        if self._deferring and not is_again:
            if not self.received:
                self.received, self._at = signum, now
                _write(f"{name_of(signum)}: finishing what is under way, then stopping.")
            return
        self.received = self.received or signum
        raise TrainingInterrupted(signum, f"{name_of(signum)} stopped {self.what} at once.")


class StopAtBoundary(TrainerCallback):
    """Ends training at the next end of a step or of a micro-batch once any rank has got a signal.

    Args:
        trainer: of `AtomicCheckpoints`; learns of the signal through `stopped_by`.
        stop: where signals are remembered.
    """

    def __init__(self, trainer: Any, stop: StopSignals) -> None:
        self.trainer, self.stop = trainer, stop
        # Engines that shard hold on to a half summed gradient; their steps are finished first.
        self.stops_within_steps = not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where training begins: what is not newer than that is saved already."""
        self.trainer._first_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step, and save it."""
        if self._is_asked(args):
            control.should_save = control.should_training_stop = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop between two micro-batches; the step before is what is saved."""
        if self.stops_within_steps and self._is_asked(args):
            self.trainer._is_within_step = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop when the signal came while a checkpoint was written."""
        if self._is_asked(args):
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop when the signal came during evaluation."""
        if self._is_asked(args):
            control.should_save = control.should_training_stop = True

    def _is_asked(self, args: TrainingArguments) -> bool:
        if not self.trainer.stopped_by:
            # The signal that any rank has received; 0 when none has.
            self.trainer.stopped_by = reduced(self.stop.received, ReduceOp.MAX, args.device)
        return bool(self.trainer.stopped_by)


def name_of(signum: int) -> str:
    """`SIGTERM` for 15."""
    return signal.Signals(signum).name


def begin_worker(then: Callable[[int], None] | None, number: int) -> None:
    """Let a data-loader worker go on after a signal that went to the whole process group.

    Its trainer still needs rows for the step it is finishing. SIGTERM, with which torch ends workers that hang, ends
    this one later.

    Args:
        then: what else a worker begins with.
        number: of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        _outlive_signals()
    if then is not None:
        then(number)


def _outlive_signals() -> None:
    """SIGTERM ends this process a while later; signals that were held back are let through."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.setitimer(signal.ITIMER_REAL, GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


def worker_context() -> BaseContext | None:
    """A way to start data-loader workers with SIGTERM and SIGINT held back until `begin_worker` takes them.

    A signal to the whole process group would otherwise kill a worker in its first milliseconds, before it has handlers.
    None where workers are not forked: they begin with signals of their own.
    """
    if sys.platform == "win32" or multiprocessing.get_start_method() != "fork":
        return None
    context: Any = copy.copy(multiprocessing.get_context("fork"))
    process: Any = context.Process

    class Held(process):
        def start(self) -> None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    context.Process = Held
    return context


def random_states() -> tuple:
    """States of all generators that training draws from."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


@contextmanager
def with_random_states(states: tuple) -> Iterator[None]:
    """Generators as they were, inside the block."""
    now = random_states()
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(now)


def _set_random_states(states: tuple) -> None:
    python, numpy, cpu, devices = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices is not None:
        torch.cuda.set_rng_state_all(devices)


def _write(message: str) -> None:
    # Not through sys.stderr: the signal may have come in the middle of one of its own writes.
    os.write(2, f"{message}\n".encode())

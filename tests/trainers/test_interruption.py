"""SIGTERM and SIGINT: a whole checkpoint, no result, an exit code that says so, and the same numbers afterwards."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import TrainerCallback

from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers import checkpoints, interruption, run_recipe
from fusedvlm.trainers.checkpoints import find_last_checkpoint, problems
from fusedvlm.trainers.interruption import StopSignals, TrainingInterrupted, random_states, with_random_states
from fusedvlm.trainers.recipes.recipe_files import set_field

STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke.write_data(tmp_path_factory.mktemp("data"))


def recipe_of(stage, folder, data, **training):
    return smoke.smoke_recipe(
        stage,
        folder,
        data,
        model={"model_name_or_path": None},
        training={"max_steps": STEPS, "save_steps": 100, **training},
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Folder of each stage's run that nobody stopped, made when first asked for."""
    done = {}

    def get(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp("whole")
            run_recipe(recipe_of(stage, done[stage], data))
        return done[stage]

    return get


def stop_and_go_on(recipe, callback, folder, expected_code=143):
    """Interrupt a run; returns the checkpoint it left, after the same recipe has been run to its end."""
    with pytest.raises(TrainingInterrupted, match="nothing was published") as caught:
        run_recipe(recipe, callbacks=[callback])
    assert caught.value.exit_code == expected_code
    assert not (folder / "final").exists()
    assert json.loads((folder / "run.json").read_text())["finished"] is None
    left = find_last_checkpoint(folder)
    run_recipe(recipe)
    return left


def assert_same(one, other):
    assert smoke.trajectory(one) == smoke.trajectory(other)
    smoke.assert_same_weights(one / "final", other / "final")


CASES = {
    "within a step": ("on_step_begin", 2, 2),
    "within an epoch's first step": ("on_step_begin", 3, 3),  # 12 samples in steps of 4
    "at the end of a step": ("on_optimizer_step", 2, 3),
    "in the last step": ("on_optimizer_step", STEPS - 1, STEPS),
}


@pytest.mark.parametrize(
    ("stage", "case"), [("contrastive", next(iter(CASES))), *(("generation", case) for case in CASES)]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(stage, case, data, whole, tmp_path):
    event, step, saved = CASES[case]
    recipe = recipe_of(stage, tmp_path, data)
    left = stop_and_go_on(recipe, smoke.SignalAt(event, step), tmp_path)
    assert left.name == f"checkpoint-{saved}"
    assert_same(whole(stage), tmp_path)


@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGINT,), 130), ((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGINT, signal.SIGINT), 130)],
)
def test_ctrl_c_and_signals_that_come_twice(signals, code, data, whole, tmp_path):
    recipe = recipe_of("generation", tmp_path, data)
    left = stop_and_go_on(recipe, smoke.SignalAt("on_step_begin", 2, signals), tmp_path, code)
    assert left.name == "checkpoint-2"
    assert_same(whole("generation"), tmp_path)


@pytest.mark.parametrize("moment", ["mark_complete", "publish"])
def test_a_signal_while_a_checkpoint_is_written_lets_it_be_whole(moment, data, whole, tmp_path, monkeypatch):
    original = getattr(checkpoints, moment)

    def interrupted(*args):
        if "checkpoint-2" in str(args[0]):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(checkpoints, moment, interrupted)
    recipe = recipe_of("generation", tmp_path, data, save_steps=2)
    with pytest.raises(TrainingInterrupted):
        run_recipe(recipe)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    assert problems(tmp_path / "checkpoint-2") == []
    assert not (tmp_path / ".incomplete").exists()
    monkeypatch.undo()
    run_recipe(recipe)
    assert_same(whole("generation"), tmp_path)


def test_a_signal_before_the_first_step_is_complete_saves_nothing_and_says_so(data, tmp_path):
    recipe = recipe_of("generation", tmp_path, data)
    with pytest.raises(TrainingInterrupted, match="no step was complete, so there is nothing to save"):
        run_recipe(recipe, callbacks=[smoke.SignalAt("on_step_begin", 0)])
    assert find_last_checkpoint(tmp_path) is None
    assert not (tmp_path / "final").exists()


def test_a_signal_while_the_model_is_built_ends_the_run_at_once(data, tmp_path, monkeypatch):
    from fusedvlm.trainers.runs import train

    def build(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(train, "build_model_and_processor", build)
    with pytest.raises(TrainingInterrupted, match="SIGTERM stopped generation before it was finished"):
        run_recipe(recipe_of("generation", tmp_path, data))


def test_without_checkpoints_there_is_nothing_to_wait_for(data, tmp_path):
    recipe = recipe_of("generation", tmp_path, data, save_strategy="no")
    with pytest.raises(TrainingInterrupted, match="at once"):
        run_recipe(recipe, callbacks=[smoke.SignalAt("on_step_end", 2)])
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / "final").exists()


def test_a_finished_result_is_published_whole_although_the_signal_came_then(data, tmp_path, monkeypatch):
    from fusedvlm.trainers.runs import train

    original = train.publish

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        original(*args)

    monkeypatch.setattr(train, "publish", interrupted)
    with pytest.raises(TrainingInterrupted, match=r"when .*final was finished"):
        run_recipe(recipe_of("generation", tmp_path, data))
    assert problems(tmp_path / "final") == []
    assert json.loads((tmp_path / "run.json").read_text())["finished"]


def test_variants_stop_too_and_go_on_with_the_one_they_were_at(data, tmp_path):
    start = tmp_path / "stage2"
    run_recipe(recipe_of("generation", start, data, max_steps=1))
    sections = {
        "model": {"model_name_or_path": str(start / "final")},
        "variants": {"pairs": [[4, 2], [1, 1]], "fuse_question": "true"},
        "training": {"max_steps": 3, "save_steps": 100},
    }
    recipe = smoke.smoke_recipe("variants", tmp_path / "ladder", data, **sections)
    with pytest.raises(TrainingInterrupted):
        run_recipe(recipe, callbacks=[smoke.SignalAt("on_optimizer_step", 1, run=1)])
    assert sorted(path.name for path in (tmp_path / "ladder").glob("fusedvlm-*")) == ["fusedvlm-m4"]
    assert find_last_checkpoint(tmp_path / "ladder" / "work" / "fusedvlm-m1").name == "checkpoint-2"
    assert [path.name for path in run_recipe(recipe)] == ["fusedvlm-m4", "fusedvlm-m1"]


@pytest.mark.parametrize(
    ("signum", "to_group"), [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_the_command_says_what_it_saved_and_exits_as_the_shell_expects(signum, to_group, data, tmp_path):
    """With workers, and as a terminal or a scheduler does it: to the whole process group."""
    run, said = tmp_path / "run", tmp_path / "stderr.txt"
    sources = json.dumps([{"type": "chat", "path": str(data)}])
    words = ["train", "contrastive", "--preset", "cpu_smoke", "--data.sources", sources, "--output_dir", str(run)]
    words += ["--max_steps", "4000", "--save_steps", "1000", "--dataloader_num_workers", "2"]
    words += ["--enable_jit_checkpoint", "true"]
    command = [sys.executable, "-c", "from fusedvlm.cli import main; main()", *words]
    with open(said, "w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True, cwd=tmp_path
        )
        while "step 3 of" not in said.read_text() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signum) if to_group else process.send_signal(signum)
        out, _ = process.communicate(timeout=120)
    err = said.read_text()
    assert process.returncode == 128 + signum, err[-900:]
    assert out == ""
    assert "Traceback" not in err
    left = find_last_checkpoint(run)
    assert f"{left.name} in {run} is whole. It is not finished and nothing was published" in err
    assert not (run / "final").exists()


def test_two_processes_stop_together_when_one_gets_the_signal(data, tmp_path):
    recipe = recipe_of("generation", tmp_path, data)
    whole = smoke.smoke_recipe("generation", tmp_path / "whole", data)
    whole.sections = {
        **recipe.sections,
        "training": {**recipe.sections["training"], "output_dir": str(tmp_path / "whole")},
    }
    assert smoke.run_ranks(2, recipe, smoke.OnRank(1, smoke.SignalAt("on_step_begin", 2))) == [1, 1]
    assert find_last_checkpoint(tmp_path).name in ("checkpoint-2", "checkpoint-3")
    assert not (tmp_path / "final").exists()
    assert smoke.run_ranks(2, recipe) == [0, 0]
    assert smoke.run_ranks(2, whole) == [0, 0]
    assert_same(tmp_path / "whole", tmp_path)


def test_handlers_are_given_back_and_only_an_ignored_sigterm_stays_ignored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    monkeypatch.setattr(interruption, "SECOND_THOUGHTS", 0.0)
    with StopSignals() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        time.sleep(0.01)
        with pytest.raises(TrainingInterrupted, match="at once"):
            os.kill(os.getpid(), signal.SIGINT)


def interrupted_before_it_has_handlers(number):
    """What a new worker does when the signal for the whole group comes in its first milliseconds."""
    for signum in interruption.WATCHED:
        os.kill(os.getpid(), signum)
    interruption.begin_worker(None, number)


@pytest.mark.parametrize("is_held_back", [True, False])
def test_a_worker_outlives_a_signal_that_comes_before_its_handlers(is_held_back):
    loader = torch.utils.data.DataLoader(range(8), batch_size=4, num_workers=2)
    loader.worker_init_fn = interrupted_before_it_has_handlers
    loader.multiprocessing_context = interruption.worker_context() if is_held_back else None
    if is_held_back:
        assert torch.cat(list(loader)).tolist() == list(range(8))
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            list(loader)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(interruption.WATCHED)


def test_the_loaders_of_a_trainer_hold_signals_back(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoints, "worker_context", lambda: seen.append(1) or interruption.worker_context())
    run_recipe(recipe_of("generation", tmp_path, data, max_steps=1, dataloader_num_workers=1))
    assert seen


def test_a_worker_that_dies_with_the_signal_is_no_missing_step(data, tmp_path, monkeypatch):
    recipe = recipe_of("generation", tmp_path, data)

    def dies(args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    callback = TrainerCallback()
    callback.on_step_begin = dies
    with pytest.raises(TrainingInterrupted, match="after step 2 of 5: a worker that reads data ended with it"):
        run_recipe(recipe, callbacks=[callback])


def test_generators_are_lent():
    before = random_states()
    expected = torch.rand(1)
    with with_random_states(before):
        assert torch.rand(1) == expected
    after = torch.rand(1)
    torch.set_rng_state(before[2])
    assert (torch.rand(1), torch.rand(1)) == (expected, after)


def test_a_run_killed_after_its_last_checkpoint_takes_no_step_more(data, whole, tmp_path, monkeypatch):
    """Killed between the last checkpoint and the result: nothing is left to be learned."""
    from fusedvlm.trainers.runs import train

    def killed(*args):
        raise SystemExit("killed")

    recipe = recipe_of("generation", tmp_path, data)
    monkeypatch.setattr(train, "save_finished", killed)
    with pytest.raises(SystemExit):
        run_recipe(recipe)
    monkeypatch.undo()
    assert find_last_checkpoint(tmp_path).name == f"checkpoint-{STEPS}"
    steps = []
    counter = TrainerCallback()
    counter.on_step_begin = lambda args, state, control, **kwargs: steps.append(state.global_step)
    run_recipe(recipe, callbacks=[counter])
    assert steps == []
    assert_same(whole("generation"), tmp_path)


def test_a_run_whose_data_ended_early_is_not_published(data, tmp_path, monkeypatch):
    from fusedvlm.trainers import checkpoints

    def ends_early(self, *args, **kwargs):
        self.control.should_training_stop = True

    monkeypatch.setattr(checkpoints.AtomicCheckpoints, "_run_epoch", ends_early)
    recipe = recipe_of("generation", tmp_path, data)
    set_field(recipe, "training.max_steps", 3)
    with pytest.raises(RuntimeError, match="ended at step 0 of 3"):
        run_recipe(recipe)
    assert not (tmp_path / "final").exists()

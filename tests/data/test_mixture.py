"""Mixtures: quotas, order as a function of (seed, epoch, i), and resumed runs that see what uninterrupted ones see."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from fusedvlm.data.mixing.mixture import Mixture, endless_rows, epoch_quotas, normalized_weights
from fusedvlm.tests.processes import run_program
from fusedvlm.trainers.callbacks.mixture_epochs import MixtureEpochs


def rows(name: str, count: int) -> list[str]:
    return [f"{name}{number}" for number in range(count)]


def epoch_of(mixture: Mixture, epoch: int = 0) -> list:
    mixture.start_epoch(epoch)
    return [mixture[index] for index in range(len(mixture))]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_all_exhausted_shows_every_row_and_keeps_the_shares(sizes, weights, seed):
    mixture = Mixture(
        [rows(name, size) for name, size in zip("abcd", sizes, strict=False)], weights[: len(sizes)], seed
    )
    seen = Counter(epoch_of(mixture))
    for name, size, share in zip("abcd", sizes, mixture.shares, strict=False):
        counts = [seen[row] for row in rows(name, size)]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1  # no row a second time before all came once
        assert abs(sum(counts) - share * len(mixture)) <= len(sizes)


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(20, 60), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_first_exhausted_repeats_nothing_within_an_epoch_and_goes_on_in_the_next(sizes, seed):
    mixture = Mixture(
        [rows(name, size) for name, size in zip("abc", sizes, strict=False)],
        [1.0] * len(sizes),
        seed,
        "first_exhausted",
    )
    first, second = epoch_of(mixture, 0), epoch_of(mixture, 1)
    assert len(first) == len(second) == min(sizes) * len(sizes)
    assert max(Counter(first).values()) == 1
    for name, size in zip("abc", sizes, strict=False):
        if size >= 2 * min(sizes):
            assert not {row for row in first if row[0] == name} & set(second)


def test_without_weights_an_epoch_is_every_row_once_in_a_mixed_order():
    sources = [rows("a", 30), rows("b", 10)]
    order = epoch_of(Mixture(sources, seed=3))
    assert sorted(order) == sorted(sources[0] + sources[1])
    assert order != sources[0] + sources[1]
    assert "b" in {row[0] for row in order[:20]}
    assert epoch_of(Mixture(sources, seed=3)) == order
    assert epoch_of(Mixture(sources, seed=4)) != order
    assert epoch_of(Mixture(sources, seed=3), epoch=1) != order


def test_an_entry_does_not_depend_on_who_asked_before():
    mixture = Mixture([rows("a", 30), rows("b", 10)], [1, 2], seed=5)
    order = epoch_of(mixture)
    fresh = Mixture([rows("a", 30), rows("b", 10)], [1, 2], seed=5)
    assert [fresh[index] for index in reversed(range(len(fresh)))] == order[::-1]


def test_the_order_does_not_change_between_releases():
    """Written down once: a change here would silently break every run that is resumed with a newer version."""
    assert epoch_of(Mixture([rows("a", 3), rows("b", 2)], seed=0)) == ["a2", "b0", "b1", "a0", "a1"]


def test_temperature():
    assert normalized_weights([100, 1], "ab", temperature=1) == pytest.approx([100 / 101, 1 / 101])
    assert normalized_weights([100, 1], "ab", temperature=2) == pytest.approx([10 / 11, 1 / 11])
    assert normalized_weights([1e300, 1e-300], "ab", temperature=1e9) == pytest.approx([0.5, 0.5], abs=1e-5)


def test_endless_rows_is_one_stream_however_it_is_cut():
    whole = endless_rows(7, 0, 40, seed=1, source=2).tolist()
    assert [*endless_rows(7, 0, 11, 1, 2), *endless_rows(7, 11, 20, 1, 2), *endless_rows(7, 31, 9, 1, 2)] == whole


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mixture([]), "at least one source"),
        (lambda: Mixture([[1], []], names=["x", "y"]), "No rows in y"),
        (lambda: Mixture([[1], [2]], [1.0]), "1 weights for 2 sources"),
        (lambda: Mixture([[1], [2]], [1.0, 0.0], names=["x", "y"]), "y: 0.0"),
        (lambda: Mixture([[1], [2]], [1.0, float("nan")]), "positive"),
        (lambda: Mixture([[1]], temperature=0), "temperature=0"),
        (lambda: Mixture([[1]], stop="never"), "'never'"),
        (lambda: Mixture([[1], [2]], [1.0, 100.0], stop="first_exhausted"), "raise the weights"),
    ],
)
def test_wrong_use(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_entries_outside_are_refused():
    with pytest.raises(IndexError, match="2"):
        Mixture([[1, 2]])[2]


def test_quotas_survive_shares_that_are_not_exact():
    assert epoch_quotas([3, 3, 3], np.array([1 / 3] * 3)) == [3, 3, 3]
    assert epoch_quotas([10, 20], np.array([0.1, 0.2]) / 0.3, "first_exhausted") == [10, 20]


def test_state_goes_to_the_epoch_and_refuses_another_seed():
    mixture = Mixture([rows("a", 9)], seed=2)
    second = epoch_of(mixture, 1)
    fresh = Mixture([rows("a", 9)], seed=2)
    fresh.load_state_dict(mixture.state_dict())
    assert [fresh[index] for index in range(9)] == second
    with pytest.raises(ValueError, match="seed 2"):
        Mixture([rows("a", 9)], seed=3).load_state_dict(mixture.state_dict())


def test_workers_that_outlive_an_epoch_follow_it():
    mixture = Mixture([list(range(12))], seed=1)
    expected = [epoch_of(mixture, epoch) for epoch in range(2)]
    loader = DataLoader(mixture, batch_size=3, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        mixture.start_epoch(epoch)
        assert torch.cat(list(loader)).tolist() == expected[epoch]


class Recorder(torch.nn.Module):
    """Remembers what it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, number):
        self.seen.extend(number.tolist())
        return {"loss": self.weight * number.float().mean()}


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train(dataset, folder, stop_at=None, resume=None, callbacks=(), **arguments) -> list[int]:
    model = Recorder()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        callbacks=[*callbacks, StopAt(stop_at)],
        data_collator=lambda samples: {"number": torch.tensor(samples)},
    )
    trainer.train(resume_from_checkpoint=resume)
    return model.seen


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize(("stop_at", "workers"), [(3, 0), (5, 0), (8, 0), (8, 2)])
def test_a_resumed_trainer_sees_what_an_uninterrupted_one_sees(tmp_path, stop_at, workers, goes_on):
    """Five steps an epoch: the stops lie within the first, between the two, and within the second."""

    def run(**kwargs):
        mixture = Mixture([list(range(9)), list(range(100, 105))], [1, 1], seed=7)
        return train(
            mixture,
            tmp_path,
            callbacks=[MixtureEpochs()] if goes_on else [],
            num_train_epochs=2,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            **kwargs,
        )

    whole = run()
    assert run(stop_at=stop_at) + run(resume=str(tmp_path / f"checkpoint-{stop_at}")) == whole
    mixture = Mixture([list(range(9)), list(range(100, 105))], [1, 1], seed=7)
    assert Counter(whole[:18]) == Counter(epoch_of(mixture))
    assert Counter(whole[18:]) == Counter(epoch_of(mixture, int(goes_on)))


TWO_RANKS = """
import sys
import torch.distributed as dist
from fusedvlm.trainers import MixtureEpochs
from fusedvlm.data.mixing.mixture import Mixture
from fusedvlm.tests.data.test_mixture import train

def run(**kwargs):
    mixture = Mixture([list(range(10)), list(range(100, 106))], seed=3)
    return train(mixture, sys.argv[1], callbacks=[MixtureEpochs()], num_train_epochs=2, dataloader_num_workers=1, **kwargs)

whole = run()
same = [run(stop_at=stop) + run(resume=f"{sys.argv[1]}/checkpoint-{stop}") == whole for stop in (1, 6)]
gathered = [None, None]
dist.all_gather_object(gathered, (whole, same))
if dist.get_rank() == 0:
    for epoch in (slice(0, 8), slice(8, 16)):
        seen = gathered[0][0][epoch] + gathered[1][0][epoch]
        assert sorted(seen) == [*range(10), *range(100, 106)], seen
    assert gathered[0][1] == gathered[1][1] == [True, True], gathered
    print("exact")
dist.destroy_process_group()
"""


def test_two_ranks_see_every_row_once_and_resume_exactly(tmp_path):
    """Within the first and within the second epoch, with a worker process on each rank."""
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    assert "exact" in run_program(2, script, tmp_path / "out")[0].stdout

"""Streaming mixtures: interrupted anywhere and continued equals never interrupted; nothing twice or lost in workers."""

import json
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from fusedvlm.data.mixing.streaming import StreamingMixture
from fusedvlm.tests.processes import run_program

SIZES = (23, 7, 12)


def plain():
    return [[f"{name}{number}" for number in range(size)] for name, size in zip("abc", SIZES, strict=True)]


def streams():
    """The same rows as `datasets` streams them: from a generator, from Arrow, and mapped."""

    def rows(names):
        for name in names:
            yield from ({"text": f"{name}{number}"} for number in range(SIZES[0]))

    second, third = ([{"text": text} for text in part] for part in plain()[1:])
    return [
        datasets.IterableDataset.from_generator(rows, gen_kwargs={"names": ["a"]}),
        datasets.Dataset.from_list(second).to_iterable_dataset(num_shards=3),
        datasets.Dataset.from_list(third).to_iterable_dataset(num_shards=2).map(lambda row: row),
    ]


def text(sample) -> str:
    return sample if isinstance(sample, str) else sample["text"]


def mixture(make=plain, **kwargs) -> StreamingMixture:
    return StreamingMixture(make(), **{"weights": [2, 1, 1], "seed": 3, "shuffle_block": 5, **kwargs})


def whole(**kwargs) -> list[str]:
    return [text(sample) for sample in mixture(**kwargs)]


@pytest.mark.parametrize("make", [plain, streams])
@pytest.mark.parametrize("stop", ["all_exhausted", "first_exhausted"])
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_stopped_and_continued_equals_uninterrupted(make, stop, block):
    kwargs = {"make": make, "stop": stop, "shuffle_block": block}
    expected = whole(**kwargs)
    for taken in (0, 1, 4, 5, 6, len(expected) - 1, len(expected)):
        first = mixture(**kwargs)
        iterator = iter(first)
        begin = [text(next(iterator)) for _ in range(taken)]
        state = json.loads(json.dumps(first.state_dict()))  # it travels in a checkpoint
        second = mixture(**kwargs)
        second.load_state_dict(state)
        assert begin + [text(sample) for sample in second] == expected, taken


@settings(max_examples=40)
@given(st.integers(0, 80), st.integers(0, 80), st.integers(0, 9))
def test_any_two_interruptions(first, second, seed):
    expected, seen, state = whole(seed=seed, stop="all_exhausted"), [], None
    for count in (first, second, 10_000):
        part = mixture(seed=seed)
        if state is not None:
            part.load_state_dict(state)
        for _, sample in zip(range(count), part, strict=False):
            seen.append(sample)
            state = part.state_dict()
        if count and state is None:
            state = part.state_dict()
    assert seen == expected


def test_all_exhausted_shows_every_row_and_first_exhausted_repeats_none():
    counts = Counter(whole())
    assert set(counts) == {row for source in plain() for row in source}
    for source in plain():
        seen = [counts[row] for row in source]
        assert max(seen) - min(seen) <= 1
    assert max(Counter(whole(stop="first_exhausted")).values()) == 1


def test_the_same_rows_whether_lists_or_datasets():
    assert whole(make=streams) == whole()


def test_order_depends_on_seed_and_epoch_only():
    assert whole() == whole()
    assert whole() != whole(seed=4)
    other = mixture()
    other.set_epoch(1)
    assert [*other] != whole()
    assert [*other] == [*other]  # iterating again does not go on, it starts anew


def test_weights_are_probabilities():
    endless = mixture(stop="never", weights=[8, 1, 1])
    names = Counter(sample[0] for sample, _ in zip(endless, range(3000), strict=False))
    assert names["a"] / 3000 == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("make", [plain, streams])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_samples_out(make, workers):
    loader = DataLoader(mixture(make, stop="first_exhausted"), batch_size=None, num_workers=workers)
    assert sorted(text(sample) for sample in loader) == sorted(whole(stop="first_exhausted"))


def test_a_state_of_another_mixture_is_refused():
    state = mixture(seed=1).state_dict()
    with pytest.raises(ValueError, match="another mixture"):
        mixture(seed=2).load_state_dict(state)


def test_wrong_use():
    with pytest.raises(ValueError, match="never"):
        mixture(stop="sometimes")
    with pytest.raises(ValueError, match="No rows in empty"):
        list(StreamingMixture([[1], []], names=["full", "empty"]))
    with pytest.raises(ValueError, match="2 weights for 3"):
        mixture(weights=[1, 2])


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
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train(folder, workers: int, stop_at: int | None = None, resume: str | None = None) -> list[int]:
    sources = [list(range(size * number, size * (number + 1))) for number, size in enumerate((9, 30))]
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=30,
        dataloader_num_workers=workers,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=Recorder(),
        args=args,
        train_dataset=StreamingMixture(sources, seed=1, stop="never", shuffle_block=4),
        callbacks=[StopAt(stop_at)],
        data_collator=lambda samples: {"number": torch.tensor(samples)},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_trainer_sees_what_an_uninterrupted_one_sees(tmp_path, workers):
    """Step 17 is beyond the end of both sources' first pass."""
    expected = train(tmp_path, workers)
    assert (
        train(tmp_path, workers, stop_at=17) + train(tmp_path, workers, resume=str(tmp_path / "checkpoint-17"))
        == expected
    )
    assert len(expected) == 120


TWO_RANKS = """
import sys
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
import torch.distributed as dist
from fusedvlm.data.mixing.streaming import StreamingMixture

accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
mixture = StreamingMixture([list(range(24)), list(range(100, 124))], seed=3, stop="never", shuffle_block=4)
loader = accelerator.prepare(DataLoader(mixture, batch_size=2, num_workers=2))
seen = []
for batch, _ in zip(loader, range(6)):
    seen.extend(batch.tolist())
gathered = [None, None]
dist.all_gather_object(gathered, seen)
if accelerator.is_main_process:
    assert len(gathered[0]) == len(gathered[1]) == 12
    assert not set(gathered[0]) & set(gathered[1]), gathered
    print("disjoint")
dist.destroy_process_group()
"""


def test_two_ranks_with_workers_share_a_stream_without_overlap(tmp_path):
    """24 samples in all, of 48: within one pass of each source, so any repetition would be a fault."""
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    assert "disjoint" in run_program(2, script)[0].stdout

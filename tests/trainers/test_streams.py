"""Training on streamed sources: one process and several, with workers, stopped and continued."""

import signal

import pytest

from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers import GenerationArguments, run_recipe
from fusedvlm.trainers.base import read_streams_on_every_rank
from fusedvlm.trainers.interruption import TrainingInterrupted
from fusedvlm.trainers.recipes.recipe_files import set_field


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke.write_data(tmp_path_factory.mktemp("data"), count=10)


def recipe_of(stage, folder, data, **training):
    recipe = smoke.smoke_recipe(
        stage,
        folder,
        data,
        model={"model_name_or_path": None},
        training={"max_steps": 4, "save_steps": 100, **training},
    )
    recipe.sections["data"]["sources"] = [{"type": "chat", "path": str(data), "streaming": True}]
    return recipe


@pytest.mark.parametrize(("stage", "workers"), [("contrastive", 0), ("generation", 0), ("generation", 2)])
def test_a_stream_trains_and_goes_on_where_it_was_stopped(stage, workers, data, tmp_path):
    """Four steps of four rows are more than one pass over ten rows."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run_recipe(recipe_of(stage, whole, data, dataloader_num_workers=workers))
    recipe = recipe_of(stage, torn, data, dataloader_num_workers=workers)
    with pytest.raises(TrainingInterrupted):
        run_recipe(recipe, callbacks=[smoke.SignalAt("on_step_begin", 3, (signal.SIGTERM,))])
    run_recipe(recipe)
    assert smoke.trajectory(whole) == smoke.trajectory(torn)
    assert len(smoke.trajectory(whole)) == 4
    smoke.assert_same_weights(whole / "final", torn / "final")


def test_two_processes_read_a_stream_each_for_itself(data, tmp_path):
    recipe = recipe_of("generation", tmp_path, data, max_steps=2)
    assert smoke.run_ranks(2, recipe) == [0, 0]
    assert len(smoke.trajectory(tmp_path)) == 2


def test_what_cannot_work_with_a_stream_is_refused(data, tmp_path):
    recipe = recipe_of("generation", tmp_path, data)
    set_field(recipe, "training.max_steps", -1)
    with pytest.raises(ValueError, match=r"have no length: say with training\.max_steps"):
        run_recipe(recipe)
    (tmp_path / "data.yaml").write_text(
        f"sources: [{{type: chat, path: {data}, streaming: true}}]\nstop: all_exhausted\n"
    )
    recipe = recipe_of("generation", tmp_path, data)
    recipe.sections["data"]["sources"] = str(tmp_path / "data.yaml")
    with pytest.raises(ValueError, match="training needs one without end"):
        run_recipe(recipe)


def test_dispatched_batches_are_refused_for_streams_only(tmp_path):
    import torch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    asked = GenerationArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config={"dispatch_batches": True})
    read_streams_on_every_rank(asked, [1, 2])
    with pytest.raises(ValueError, match="dispatch_batches cuts batches by rows"):
        read_streams_on_every_rank(asked, Stream())
    silent = GenerationArguments(output_dir=str(tmp_path), use_cpu=True)
    read_streams_on_every_rank(silent, {"one": [1], "other": Stream()})
    assert silent.accelerator_config.dispatch_batches is False

"""Kill -9 anywhere, start the same command again, and every number equals the run that was never interrupted."""

import random
import time

import pytest

from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers.checkpoints import find_last_checkpoint

STEPS = 7  # 12 samples in steps of 4: more than two epochs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory):
    """A stage-1 result to start stage 2 from."""
    folder = tmp_path_factory.mktemp("stage1")
    assert smoke.run(smoke.smoke_recipe("contrastive", folder, data)) == 0
    return folder / "final"


@pytest.fixture(scope="module")
def stage2(data, stage1, tmp_path_factory):
    """A stage-2 result to start variants from."""
    folder = tmp_path_factory.mktemp("stage2")
    recipe = smoke.smoke_recipe("generation", folder, data, model={"model_name_or_path": str(stage1)})
    assert smoke.run(recipe) == 0
    return folder / "final"


ELASTIC = {"elastic_num_visual_tokens": [1, 3, 8], "elastic_warmup_fraction": 0.2, "elastic_warmup_minimum": 3}
GROUPED = {
    "batch_groups": {"a": 3, "b": 1}, "elastic_range": [1, 6], "elastic_by_source": {"b": [8, "2-4"]},
    "elastic_per_sample_sources": ["a"], "elastic_followup": [1, 2], "loss_per": "answer", "until_loss": 0.01,
    "until_loss_steps": 2, "dataloader_num_workers": 1, "elastic_warmup_minimum": 3, "elastic_warmup_sources": ["b"],
}  # fmt: skip
CASES = {
    "contrastive": ("contrastive", {}),
    "generation": ("generation", {}),
    "elastic": ("elastic", {"training": ELASTIC}),
    "mixture with workers": ("elastic", {"training": {**ELASTIC, "dataloader_num_workers": 1}, "weights": (3, 1)}),
    "sources in groups": ("elastic", {"training": {**GROUPED, "elastic_num_visual_tokens": None}, "names": ("a", "b")}),
    "sparse logs": ("generation", {"training": {"logging_steps": 3}}),
}


@pytest.fixture(scope="module")
def make(data, stage1):
    """Recipes of the cases; saving every second step."""

    def build(case: str, folder):
        stage, sections = CASES[case]
        training = {"max_steps": STEPS, "save_steps": 2, **sections.get("training", {})}
        model = {"model_name_or_path": None if stage == "contrastive" else str(stage1)}
        if stage == "elastic":
            model["trained_num_visual_tokens"] = [1, 3, 8]
        recipe = smoke.smoke_recipe(stage, folder, data, training=training, model=model)
        if "weights" in sections:
            source = recipe.sections["data"]["sources"][0]
            recipe.sections["data"]["sources"] = [{**source, "weight": weight} for weight in sections["weights"]]
        if "names" in sections:
            source = recipe.sections["data"]["sources"][0]
            recipe.sections["data"]["sources"] = [{**source, "name": name} for name in sections["names"]]
            recipe.sections["run"]["global_batch_size"] = None
        return recipe

    return build


@pytest.fixture(scope="module")
def uninterrupted(make, tmp_path_factory):
    """Folder of each case's run without interruption, made when first asked for."""
    done = {}

    def get(case: str):
        if case not in done:
            folder = tmp_path_factory.mktemp("whole")
            assert smoke.run(make(case, folder)) == 0
            done[case] = folder
        return done[case]

    return get


def assert_same_run(whole, resumed, steps: int = STEPS):
    rows = smoke.trajectory(whole)
    assert rows[-1]["step"] == steps or len(rows) == steps // 3
    assert smoke.trajectory(resumed) == rows
    smoke.assert_same_weights(whole / "final", resumed / "final")


@pytest.mark.parametrize("case", CASES)
def test_killed_at_a_random_step(case, make, uninterrupted, tmp_path):
    step = smoke.random_step(case, STEPS)
    recipe = make(case, tmp_path)
    assert smoke.run(recipe, smoke.KillAt(step)) == smoke.KILLED
    assert not (tmp_path / "final").exists()
    saved = find_last_checkpoint(tmp_path)
    assert (saved is None) == (step < 3)  # the kill comes before the save of the same step
    assert smoke.run(recipe) == 0
    assert_same_run(uninterrupted(case), tmp_path)


def test_losses_of_the_case_with_elastic_m_name_the_m_drawn(uninterrupted):
    """The comparison above covers the draws: every row says which m it was."""
    drawn = [{name for name in row if name.startswith("loss_m_")} for row in smoke.trajectory(uninterrupted("elastic"))]
    assert all(len(names) == 1 for names in drawn)
    assert len(set.union(*drawn)) > 1


@pytest.mark.parametrize("moment", ["optimizer", "mark_complete", "write_atomically", "publish"])
def test_killed_while_a_checkpoint_is_written(moment, make, uninterrupted, tmp_path):
    recipe = make("generation", tmp_path)
    assert smoke.run(recipe, smoke.KillInSave(moment)) == smoke.KILLED
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    assert (tmp_path / ".incomplete" / "checkpoint-4").is_dir()
    assert smoke.run(recipe) == 0
    assert not (tmp_path / ".incomplete").exists()
    assert_same_run(uninterrupted("generation"), tmp_path)


def test_a_damaged_checkpoint_is_passed_over(make, uninterrupted, tmp_path):
    recipe = make("generation", tmp_path)
    assert smoke.run(recipe, smoke.KillAt(6)) == smoke.KILLED
    newest = tmp_path / "checkpoint-4"
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    assert find_last_checkpoint(tmp_path).name == "checkpoint-2"
    assert smoke.run(recipe) == 0
    assert_same_run(uninterrupted("generation"), tmp_path)


def variants_recipe(folder, data, stage2):
    return smoke.smoke_recipe(
        "variants",
        folder,
        data,
        model={"model_name_or_path": str(stage2)},
        variants={"pairs": [[12, 2], [1, 1]], "fuse_question": "both"},
        training={"max_steps": 3, "save_steps": 1},
    )


NAMES = ["fusedvlm-m12", "fusedvlm-m1", "fusedvlm-m12-no-question", "fusedvlm-m1-no-question"]


def test_variants_survive_kills_at_random_moments(data, stage2, tmp_path):
    """Every variant, one beyond stage 2's own m included, equals the one of a ladder that was never interrupted."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert smoke.run(variants_recipe(whole, data, stage2)) == 0
    assert smoke.run(variants_recipe(torn, data, stage2), smoke.KillAt(2, run=1)) == smoke.KILLED
    assert [name for name in NAMES if (torn / name).exists()] == NAMES[:1]
    generator = random.Random(0)
    for _ in range(2):
        process = smoke.start(variants_recipe(torn, data, stage2))
        time.sleep(generator.uniform(0.5, 2.5))
        process.kill()
        process.join()
    assert smoke.run(variants_recipe(torn, data, stage2)) == 0
    for name in NAMES:
        smoke.assert_same_weights(whole / name, torn / name)
        assert smoke.trajectory(whole / "work" / name) == smoke.trajectory(torn / "work" / name)

"""What counts as a whole folder, and what the trainer writes into one."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from fusedvlm.tests import tiny
from fusedvlm.tests.trainers.test_trainers import DATA, arguments
from fusedvlm.trainers import GenerationArguments, GenerationTrainer
from fusedvlm.trainers.checkpoints import (
    MARKER,
    STAGING,
    complete_folder,
    find_last_checkpoint,
    mark_complete,
    problems,
    publish,
    write_atomically,
)


def folder_of(path, **files):
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_marked_folder_is_whole_until_a_file_changes(tmp_path):
    folder = folder_of(tmp_path / "checkpoint-3", a="one", b="two")
    assert problems(folder) == [f"it has no {MARKER}, so it was not written to its end"]
    mark_complete(folder)
    assert problems(folder) == []
    (folder / "c").write_text("a note of the user's")
    assert problems(folder) == []
    (folder / "a").write_text("eno")
    assert problems(folder) == ["a was changed (its hash differs)"]
    assert problems(folder, contents=False) == []
    (folder / "a").write_text("on")
    assert problems(folder) == ["a has 2 bytes instead of 3"]
    (folder / "b").unlink()
    assert problems(folder) == ["a has 2 bytes instead of 3", "b is missing"]
    (folder / MARKER).write_text("{")
    assert problems(folder) == [f"its {MARKER} is damaged"]


def test_the_newest_whole_checkpoint_by_number_and_reports_of_the_others(tmp_path):
    for step in (9, 10, 100):
        mark_complete(folder_of(tmp_path / f"checkpoint-{step}", a="one"))
    folder_of(tmp_path / "checkpoint-1000", a="one")
    folder_of(tmp_path / STAGING / "checkpoint-2000", a="one")
    folder_of(tmp_path / "checkpoint-best", a="one")
    (tmp_path / "checkpoint-100" / "a").unlink()
    reports = []
    assert find_last_checkpoint(tmp_path, reports.append).name == "checkpoint-10"
    assert [report.split(" is passed over: ")[1] for report in reports] == [
        f"it has no {MARKER}, so it was not written to its end.",
        "a is missing.",
    ]
    assert find_last_checkpoint(tmp_path / "nothing") is None


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path):
    target = tmp_path / "final"

    def stop_half_way():
        with complete_folder(target) as staging:
            (staging / "a").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert not target.exists()
    with complete_folder(target) as staging:
        assert list(staging.iterdir()) == []
        (staging / "a").write_text("whole")
    assert problems(target) == []
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_publishing_replaces_an_older_folder(tmp_path):
    old, new = folder_of(tmp_path / "final", a="old"), folder_of(tmp_path / STAGING / "final", a="new")
    publish(new, old)
    assert (tmp_path / "final" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_text_file_is_replaced_whole(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def trainer_in(folder, backbones, processor, **options):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **options}
    return GenerationTrainer(
        model=tiny.build_model(backbones),
        args=arguments(GenerationArguments, folder, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:2],
        processing_class=processor,
    )


def test_a_trainers_checkpoint_has_every_part_and_answers(backbones, processor, tmp_path):
    trainer_in(tmp_path, backbones, processor).train()
    checkpoint = find_last_checkpoint(tmp_path)
    files = json.loads((checkpoint / MARKER).read_text())["files"]
    assert {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "processor_config.json", "tokenizer.json", "query_tokenizer/tokenizer.json"} <= set(files)  # fmt: skip
    assert all(facts["bytes"] == (checkpoint / name).stat().st_size for name, facts in files.items())
    assert not (tmp_path / STAGING).exists()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    own = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    inputs = own(text="<image>what?", images=[tiny.picture(0)], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_resume_true_takes_the_newest_whole_one_and_a_damaged_path_is_refused(backbones, processor, tmp_path):
    trainer_in(tmp_path, backbones, processor).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    trainer = trainer_in(tmp_path, backbones, processor)
    with pytest.raises(ValueError, match=r"checkpoint-2 is not a whole checkpoint: optimizer.pt has 4 bytes instead"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    seen = []
    trainer._load_rng_state = seen.append
    trainer.train(resume_from_checkpoint=True)
    assert {str(path) for path in seen} == {str(tmp_path / "checkpoint-1")}
    with pytest.raises(ValueError, match="There is no whole checkpoint"):
        trainer_in(tmp_path / "empty", backbones, processor).train(resume_from_checkpoint=True)


def test_the_limit_counts_and_the_best_is_kept_under_its_name(backbones, processor, tmp_path):
    trainer = trainer_in(
        tmp_path, backbones, processor, max_steps=4, save_total_limit=2, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(names) == 2
    assert "checkpoint-4" in names
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    for name in names:
        assert problems(tmp_path / name) == []
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_a_checkpoint_without_a_part_is_never_published(backbones, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="was written without its optimizer, scheduler, random state"):
        trainer_in(tmp_path, backbones, processor).train()
    assert list(tmp_path.glob("checkpoint-*")) == []

"""The whole quickstart at its smallest, through the command line; accuracy is the real run's business."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape

import pytest
import torch

from fusedvlm.tests import fork_server
from fusedvlm.tests.phone import assert_fits_a_phone
from fusedvlm.tests.quickstart.smallest import TINY


@pytest.fixture(scope="module")
def family(quickstart_family, tmp_path_factory):
    """A copy of the family that these tests may move and write to."""
    folder = tmp_path_factory.mktemp("family") / "quickstart"
    shutil.copytree(quickstart_family.folder, folder)
    return replace(quickstart_family, folder=folder)


def test_every_stage_ran_and_was_recorded(family):
    record = json.loads((family.folder / "run.json").read_text())
    assert record["stages"]["generation"]["steps"] == 14
    assert record["stages"]["generation"]["look_up"] | {"last_loss": None} == {
        "steps": 4,
        "ended_by_its_loss": False,  # nobody learns in four steps
        "last_loss": None,
    }
    assert record["stages"]["generation"]["tflops"] > 0
    assert 0 <= record["stages"]["vision_warmup_cells_right"] <= 1
    assert set(record["stages"]["contrastive"]) == {"contrastive_loss", "identity_loss", "retrieval_at_1"}
    results = json.loads((family.folder / "results.json").read_text())
    assert {(s["task"], s["num_visual_tokens"]) for s in results["scores"]} == {
        (task, m) for task in ("colour", "shape", "letter", "list", "read") for m in (1, 4)
    }
    assert [row["num_visual_tokens"] for row in results["latencies"]] == [1, 4]
    assert results["environment"]["command"] == "fusedvlm quickstart"


def test_variants_are_complete_self_contained_and_leave_no_partial_folder(family):
    names = sorted(path.name for path in family.folder.iterdir())
    assert not [name for name in names if "partial" in name or "untrained" in name]
    for m in (1, 4):
        config = json.loads((family.folder / f"fusedvlm-m{m}" / "config.json").read_text())
        assert config["num_visual_tokens"] == m
        assert config["trained_num_visual_tokens"] == [1, 2, 3, 4]
        processor = json.loads((family.folder / f"fusedvlm-m{m}" / "processor_config.json").read_text())
        assert processor["trained_num_visual_tokens_is_range"] is config["trained_num_visual_tokens_is_range"] is True
        assert config["fusion_row_per_turn"] is True
        assert config["fuse_question"]
        assert config["text_model_name_or_path"] is None
    moved = family.folder.with_name("moved-family")
    family.folder.rename(moved)
    try:
        from fusedvlm import VisualChat
        from fusedvlm.quickstart.world import make_sample

        chat = VisualChat(str(moved / "fusedvlm-m4"))
        assert isinstance(chat.ask([make_sample(0, 0).image], "list all objects", max_new_tokens=3), str)
    finally:
        moved.rename(family.folder)


def test_the_frozen_parts_stayed_frozen(family):
    from transformers import AutoModelForCausalLM

    from fusedvlm import FusedVLMForConditionalGeneration

    llm = AutoModelForCausalLM.from_pretrained(family.folder / "llm")
    variant = FusedVLMForConditionalGeneration.from_pretrained(family.folder / "fusedvlm-m4")
    stage1 = FusedVLMForConditionalGeneration.from_pretrained(family.folder / "stage1")
    assert torch.equal(llm.lm_head.weight, variant.lm_head.weight)
    for name, tensor in stage1.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, variant.model.vision_tower.state_dict()[name])
    assert not torch.equal(
        stage1.model.fuser.layers[0].mlp.up_proj.weight, variant.model.fuser.layers[0].mlp.up_proj.weight
    )


def test_the_clock_is_kept_and_said(family, tmp_path, capsys):
    """With no time left stage 2 stops after its first step, with its learning rate decayed."""
    import numpy as np

    from fusedvlm import FusedVLMForConditionalGeneration
    from fusedvlm.processing import FusedVLMProcessor
    from fusedvlm.quickstart import phases, stages, world

    model = FusedVLMForConditionalGeneration.from_pretrained(family.folder / "fusedvlm-m4")
    processor = FusedVLMProcessor.from_pretrained(family.folder / "fusedvlm-m4")
    samples = [world.make_sample(0, index) for index in range(4)]
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 5, 5, TINY.vision_width))).float()
    material = phases.Material(samples, features, tmp_path)
    clock, minutes = stages.Clock(minutes=0.0), itertools.count()
    clock.elapsed = lambda: 60.0 * next(minutes)  # a minute passes whenever somebody looks, however fast the machine is
    out = phases.train_generation(TINY, model, processor, material, clock)
    assert out["steps"] == out["look_up"]["steps"] == 1
    said = capsys.readouterr().err
    assert "The look-up phase was cut after 1 of at most 4 steps, before its loss had fallen" in said
    assert "The clock allowed 1 of 14 stage-2 steps" in said


def test_report_shows_what_was_measured(family, tmp_path):
    from fusedvlm.quickstart.family_report import write_report

    page = write_report([family], tmp_path)
    assert_fits_a_phone(page, tmp_path / "phone")
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 2 + 2  # two plots, two example images
    scores, latencies = table_after(html, "score (standard error)"), table_after(html, "latency, median of 3")
    assert scores[0][1:] == latencies[0][1:] == ["m = 1", "m = 4"]
    for row in scores[1:-2]:
        measured = [s for s in family.results.scores if s.task == row[0]]
        assert row[1:] == [f"{s.score:.3f} ({s.standard_error:.3f})" for s in measured]
    assert {row[0] for row in scores[1:-2]} == {s.task for s in family.results.scores}
    assert scores[-2] == ["mean", *(f"{mean:.3f}" for mean in family.mean_scores().values())]
    assert scores[-1] == ["mean, images swapped", *(f"{mean:.3f}" for mean in family.mean_scores(True).values())]
    timings = family.results.latencies
    assert latencies[1] == ["first token, ms", *(f"{1000 * row.time_to_first_token:.1f}" for row in timings)]
    assert latencies[2] == ["8 tokens, ms", *(f"{1000 * row.seconds_per_answer:.1f}" for row in timings)]
    shown = re.findall(r"<p><b>(.*?)</b> <small>right: (.*?)</small>", html)
    assert [tuple(map(unescape, pair)) for pair in shown] == [(e["question"], e["expected"]) for e in family.examples]
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["families"][0]["mean_score"] == {str(m): s for m, s in family.mean_scores().items()}
    assert "http" not in html.replace("http-equiv", "")  # self-contained


def test_second_turns_and_the_m_in_between_are_measured_and_shown(family, tmp_path):
    from fusedvlm.quickstart.family_report import second_turn_table, second_turns, write_report

    pairs = {(t.after, t.num_visual_tokens, t.num_followup_visual_tokens) for t in family.second_turns}
    assert pairs == {
        ("one_word", 1, 1), ("one_word", 4, 1), ("dense", 4, 1), ("one_word", 2, 2), ("one_word", 4, 2), ("dense", 4, 2),
    }  # fmt: skip
    assert {t.task for t in family.second_turns} == {"colour", "shape", "letter"}
    saved = json.loads((family.folder / "measured" / "second_turns.json").read_text())
    assert len(saved) == len(family.second_turns) == 6 * 3
    assert {s.num_visual_tokens for s in family.between.scores} == {3}
    html = write_report([family], tmp_path).read_text()
    rows = table_after(html, "after")
    assert [row[:3] for row in rows[1:]] == [
        [f"a {row['after']} question", str(row["m"]), str(row["followup"])] for row in second_turns(family)
    ]
    assert len(second_turn_table(family)) == 7


def scored(task: str, m: int, score: float, error: float):
    from fusedvlm.evaluation import TaskScore

    return TaskScore(task, m, score, 100, error)


def test_a_score_in_between_is_compared_with_the_line_between_its_neighbors(family):
    from fusedvlm.quickstart.family_report import between_neighbors

    results = replace(family.results, scores=[scored("list", 2, 0.1, 0.01), scored("list", 8, 0.5, 0.02)])
    between = replace(family.results, scores=[scored("list", 4, 0.42, 0.03)])
    (row,) = between_neighbors(replace(family, results=results, between=between))
    assert row["neighbors"] == (2, 8)
    assert row["expected"] == pytest.approx(0.3)  # 4 lies halfway from 2 to 8 in doublings
    error = (0.03**2 + (0.5 * 0.01) ** 2 + (0.5 * 0.02) ** 2) ** 0.5
    assert row["standard_error"] == pytest.approx(error)
    assert row["z"] == pytest.approx(0.12 / error)
    assert row["is_between"]
    between.scores[0] = scored("list", 4, 0.6, 0.03)
    assert not between_neighbors(replace(family, results=results, between=between))[0]["is_between"]


def test_recipes_without_the_question_get_the_same_compute_and_are_shown_beside(family, tmp_path):
    import numpy as np

    from fusedvlm.quickstart import compare, preparation, world
    from fusedvlm.quickstart.family_report import write_report

    generator = np.random.default_rng(0)
    features = torch.from_numpy(generator.normal(size=(4, 5, 5, TINY.vision_width))).float()
    samples = [world.make_sample(0, index) for index in range(4)]
    questions = {task: [] for task in world.TASKS}
    for number, sample in enumerate(samples):
        for task in sample.cell_tasks():
            questions[task].append((number, sample.cell_question(task, next(iter(sample.content)))))
        dense = sample.dense_question()
        questions[dense.task].append((number, dense))
    assert all(questions.values())
    prepared = preparation.Prepared(samples, features, samples, features, questions, {}, family.folder / "llm")
    spent = family.stages["generation"]
    found = compare.compare_recipes(TINY, prepared, replace(family, folder=tmp_path), "fusedvlm quickstart --compare")
    ours, twin, unconditioned = found.entrants
    per_step = {entrant.name: entrant.stages["tflops"] / entrant.stages["steps"] for entrant in (twin, unconditioned)}
    for entrant in (twin, unconditioned):  # to one step's compute
        assert 0 <= entrant.stages["tflops"] - spent["tflops"] < 1.5 * per_step[entrant.name]
    assert twin.stages["look_up"]["steps"] == spent["look_up"]["steps"]
    assert "look_up" not in unconditioned.stages
    assert ours.results is family.results
    mean = np.mean([s.score for s in twin.results.scores if s.task in ("list", "read") and s.num_visual_tokens == 4])
    assert twin.means(dense=True)[4] == pytest.approx(mean)
    assert set(json.loads((tmp_path / "measured" / "comparison.json").read_text())) == set(compare.TITLES)
    html = write_report([replace(family, comparison=found)], tmp_path / "page").read_text()
    rows = table_after(html, "mean score")
    assert [row[0] for row in rows[1:4]] == [f"one-word tasks: {title}" for title in compare.TITLES.values()]
    assert rows[5][1:3] == [f"{score:.3f}" for score in twin.means(dense=True).values()]


def table_after(html: str, corner: str) -> list[list[str]]:
    """The cells' text, row by row, of the table whose first cell begins with `corner`."""
    tables = re.findall(r"<table>(.*?)</table>", html, re.DOTALL)
    (table,) = [table for table in tables if re.match(rf"\s*<tr><th>{re.escape(corner.split()[0])}", table)]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    return [[unescape(re.sub(r"<[^>]+>", "", cell)) for cell in row] for row in rows]


def test_scaling_page_is_made_even_where_scores_are_zero(family):
    from fusedvlm.quickstart.family_report import write_scaling_pages

    assert min(score.score for score in family.results.scores) == 0  # nobody learns in fourteen steps
    page = write_scaling_pages([family])[0]
    assert page == family.folder / "scaling.html"
    assert "swapped" not in page.read_text()


def test_wrong_preset_is_refused(tmp_path):
    command = [
        fork_server.executable("fusedvlm"),
        "quickstart",
        "--preset",
        "huge",
        "--output",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert result.returncode == 2
    assert "presets are cpu, gpu" in result.stderr


def test_language_model_that_cannot_train_is_reported(tmp_path, monkeypatch):
    from fusedvlm.quickstart.pretraining import LanguageModelProcess

    monkeypatch.setattr(sys, "executable", fork_server.executable())
    process = LanguageModelProcess(replace(TINY, llm_width=-1), tmp_path / "llm")
    with pytest.raises(RuntimeError, match="Pretraining the language model failed"):
        process.wait()
    assert not (tmp_path / "llm").exists()

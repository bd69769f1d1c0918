"""The whole quickstart at its smallest, through the command line; accuracy is the real run's business."""

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
        assert config["trained_num_visual_tokens"] == [1, 4]
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
    from fusedvlm.quickstart import stages, world

    model = FusedVLMForConditionalGeneration.from_pretrained(family.folder / "fusedvlm-m4")
    processor = FusedVLMProcessor.from_pretrained(family.folder / "fusedvlm-m4")
    samples = [world.make_sample(0, index) for index in range(4)]
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 5, 5, TINY.vision_width))).float()
    out = stages.train_generation(TINY, model, processor, samples, features, tmp_path, stages.Clock(minutes=0.0))
    assert out["steps"] == 1
    assert "The clock allowed 1 of 14 stage-2 steps" in capsys.readouterr().err


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


def table_after(html: str, corner: str) -> list[list[str]]:
    """The cells' text, row by row, of the table whose first cell begins with `corner`."""
    (table,) = [table for table in re.findall(r"<table>(.*?)</table>", html, re.DOTALL) if corner[:12] in table]
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

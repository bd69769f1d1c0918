"""`fusedvlm scaling lab` from nothing to a page, continued where it stopped, over a grid of one's own; its sums by hand."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.evaluation import EvaluationResults, TaskScore, describe_environment
from fusedvlm.lab import lab_jobs, lab_worker
from fusedvlm.lab.lab_jobs import LabFolder
from fusedvlm.lab.lab_plan import GLANCE, claim_folder, make_plan, read_plan
from fusedvlm.lab.lab_run import run_workers
from fusedvlm.lab.lab_summary import Costs, Panel, best_for_budgets, claim_verdicts, summarize_grid
from fusedvlm.lab.variant_grid import WORLD_KINDS, Grid, GridVariant, parse_kinds, read_grid_folder, smoothed
from fusedvlm.quickstart.world import TASKS
from fusedvlm.scaling import read_grid
from fusedvlm.tests.phone import assert_fits_a_phone

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
DOCS = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""  # no part of an installed package
PLAN = replace(GLANCE, num_visual_tokens=(1, 2), llm_widths=(8, 16))


def run(*arguments):
    return CliRunner().invoke(app, ["scaling", "lab", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished lab, done by one worker in this process."""
    folder = tmp_path_factory.mktemp("lab") / "run"
    claim_folder(folder, PLAN)
    lab_worker.work(LabFolder(PLAN, folder, "fusedvlm scaling lab", workers=1))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_the_page_shows_every_cell_law_and_training(folder, tmp_path):
    record = tmp_path / "record.md"
    result = run("--output", folder, "--report", "--json", "--record", record)
    assert result.exit_code == 0, (result.exception, result.stderr[-2000:])
    document = json.loads(result.stdout)
    assert [panel["title"] for panel in document["panels"]] == [
        f"{kind}, {family}" for kind in WORLD_KINDS for family in ("with the question", "without the question")
    ]
    for panel in document["panels"]:
        assert [(c["variant"][:5], c["num_visual_tokens"]) for c in panel["cells"]] == [
            ("llm8-", 1), ("llm8-", 2), ("llm16", 1), ("llm16", 2),
        ]  # fmt: skip
    assert {one["variant"] for one in document["trainings"]} == {
        f"llm{width}-{family}" for width in (8, 16) for family in ("question", "no-question")
    }
    assert all(growth["pairs"] == PLAN.divergence_pairs for growth in document["growth"])
    assert len(document["text_scores"]) == 2
    page = folder / "lab.html"
    assert_fits_a_phone(page, tmp_path / "phone")
    assert page.read_text().count("<svg") == 4 + 2 + 2
    assert "What came out" in page.read_text()
    assert "| look-up, with the question |" in record.read_text()
    # The grid beside it is one that `scaling optimal` reads, with its standard errors.
    cells = read_grid(folder / "lab-grid.csv", "dense without the question")
    assert len(cells) == 4
    assert all(cell.standard_error > 0 for cell in cells)


@pytest.mark.parametrize("command", re.findall(r"^    fusedvlm scaling (lab.*)$", DOCS, re.MULTILINE))
def test_commands_of_the_docs(folder, command, monkeypatch):
    """In a folder where all is done, at the size of this test."""
    folder.parent.joinpath("runs").mkdir()
    folder.rename(folder.parent / "runs" / "lab")
    shutil.copytree(folder.parent / "runs" / "lab" / "variants", folder.parent / "VARIANTS")
    monkeypatch.chdir(folder.parent)
    trains = "--report" not in command and "VARIANTS" not in command
    words = [*shlex.split(command)[1:], *(["--preset", "glance", "--tokens", "1,2"] if trains else [])]
    result = run(*words)
    assert result.exit_code == 0, (result.exception, result.stderr[-2000:])
    assert "Page: runs/" in result.stdout


def test_a_lab_continues_with_what_is_missing_and_does_nothing_twice(folder, monkeypatch):
    lab = LabFolder(PLAN, folder, "fusedvlm scaling lab")
    assert lab.unfinished() == []
    path = folder / "variants" / "llm8-question" / "results.json"
    whole = EvaluationResults.load(path)
    partly = EvaluationResults(whole.environment, [s for s in whole.scores if s.num_visual_tokens == 1])
    partly.question_scores = {task: {1: by_m[1]} for task, by_m in whole.question_scores.items()}
    partly.save(path)
    assert [job.name for job in lab.unfinished()] == ["llm8-question"]
    assert any(
        "llm8-question: not finished" in note
        for note in json.loads(run("--output", folder, "--report", "--json").stdout)["notes"]
    )
    monkeypatch.setattr(lab_jobs, "train_generation", lambda *a, **k: pytest.fail("weights that are there are kept"))
    asked = []
    evaluate = lab_jobs.evaluate
    monkeypatch.setattr(lab_jobs, "evaluate", lambda *a, **k: asked.append(k["counts"]) or evaluate(*a, **k))
    lab_worker.work(lab)
    assert asked == [[2]]
    assert EvaluationResults.load(path) == whole


def test_another_plan_is_refused_and_a_failing_process_is_named(folder, tmp_path):
    result = run("--output", folder, "--preset", "glance", "--tokens", "1,2", "--seed", 7)
    assert result.exit_code != 0
    assert "holds a lab with other settings (seed 0, now 7)" in str(result.exception)
    lab = LabFolder(PLAN, folder, "fusedvlm scaling lab", workers=1)
    shutil.rmtree(folder / "variants" / "llm16-question")
    (folder / "vision" / "images.json").write_text("[")
    with pytest.raises(RuntimeError, match=r"llm16-question failed: .*images\.json: damaged"):
        run_workers(lab, 1, 1)
    assert not (folder / "variants" / "llm16-question").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "presets are cpu, glance"),
        ({"llm_widths": "8"}, "--llm-widths: a law over them needs at least two"),
        ({"llm_widths": "8,12"}, "12 is not a multiple of 8"),
        ({"tokens": "1,x"}, "whole numbers stand between commas"),
        ({"tokens": "0,1"}, "numbers start at 1"),
    ],
)
def test_plans_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**{"preset": "cpu", "llm_widths": None, "tokens": None, "seed": 0, **options})


def test_a_plan_survives_its_file(tmp_path):
    plan = make_plan("cpu", "16,32", "1,4", 3)
    claim_folder(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    (tmp_path / "plan.json").write_text('{"llm_widths": [8]}')
    with pytest.raises(ValueError, match="is no plan of a lab"):
        read_plan(tmp_path)


def test_a_folder_of_variants_is_read_whatever_its_shape(finished, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(finished / "variants" / "llm8-question", mine / "small")
    shutil.copytree(finished / "variants" / "llm16-question", mine / "family" / "fusedvlm-m2")
    (mine / "family" / "fusedvlm-m2" / "results.json").rename(mine / "family" / "results.json")
    (mine / "family" / "fusedvlm-m2" / "results.questions.json").rename(mine / "family" / "results.questions.json")
    (mine / "stray").mkdir()
    shutil.copy(mine / "small" / "results.json", mine / "stray")
    grid = read_grid_folder(mine)
    assert sorted(variant.name for variant in grid.variants) == ["family", "small"]
    assert grid.left_out == ("stray: results, and no variant beside them (config.json of a FusedVLM)",)
    assert [len({c.llm_parameters for c in grid.cells(True, kind)}) for kind in grid.kinds] == [2, 2]
    result = run(mine, "--output", tmp_path / "out", "--kind", "one=colour,shape", "--json")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert [panel["title"] for panel in document["panels"]] == ["one, with the question"]
    assert not list((tmp_path / "out").glob("plan.json"))

    assert "is no folder" in str(run(tmp_path / "none").exception)
    (tmp_path / "empty").mkdir()
    assert "no variant with results.json" in str(run(tmp_path / "empty").exception)
    assert "nobody was scored on sound" in str(run(mine, "--kind", "x=sound").exception)
    for rule in ("x", "=a", "x="):
        with pytest.raises(ValueError, match="write NAME=task,task"):
            parse_kinds([rule])


def test_smoothing_is_that_of_half_a_right_and_half_a_wrong_answer():
    scores = np.array([1.0, 1.0, 0.25, 0.0, 1.0])
    error = float(scores.std(ddof=1) / 5**0.5)
    values, weights = np.array([*scores, 1.0, 0.0]), np.array([1, 1, 1, 1, 1, 0.5, 0.5])
    center = (values * weights).sum() / 6
    mean, standard_error = smoothed(TaskScore("list", 4, float(scores.mean()), 5, error))
    assert mean == pytest.approx(center)
    assert standard_error == pytest.approx(np.sqrt((weights * (values - center) ** 2).sum()) / 6)
    all_right = smoothed(TaskScore("letter", 1, 1.0, 256, 0.0))
    assert all_right[0] < 1
    assert 0.001 < all_right[1] < 0.005
    with pytest.raises(ValueError, match="not between 0 and 1; state its scale"):
        smoothed(TaskScore("list", 4, 61.2, 5, 0.1))
    assert smoothed(TaskScore("list", 4, 0.5, 100, None))[1] == pytest.approx(0.05, rel=0.02)  # what is not stated


def test_benchmarks_on_other_scales_stand_on_one_and_those_without_an_end_are_left_out(finished, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(finished / "variants" / "llm8-question", mine / "small")
    (mine / "small" / "results.questions.json").unlink()
    rows = [
        TaskScore("TextVQA", 4, 61.5, 100, 2.0, scale="0..100"),
        TaskScore("TextVQA", 4, 70.0, 100, 2.0, metric="f1", scale="0..100", is_primary=False),
        TaskScore("MME", 4, 1400.0, 100, None, scale="0..2800"),
        TaskScore("COCO", 4, 80.0, 100, None, metric="CIDEr", scale="from 0"),
    ]
    EvaluationResults(describe_environment("test"), rows).save(mine / "small" / "results.json")
    grid = read_grid_folder(mine)
    assert {row.task: row.score for row in grid.variants[0].results.scores} == {"TextVQA": 0.615, "MME": 0.5}
    assert grid.left_out == ("small, COCO CIDEr: a score without an upper bound has no error",)
    assert list(grid.kinds) == ["TextVQA", "MME"]
    assert grid.cells(True, "TextVQA")[0].standard_error == pytest.approx(0.02, rel=0.02)


def grid_of(finished, error_of) -> Grid:
    """Two LLM sizes by two families with the errors that a function of (kind, N, m, reads) says."""
    variants = []
    for variant in read_grid_folder(finished / "variants").variants:
        rows = [
            TaskScore(task, m, 1 - error_of(kind, variant.llm_parameters, m, variant.reads_question), 10_000, 1e-3)
            for kind, tasks in WORLD_KINDS.items()
            for task in tasks
            for m in (1, 4, 32)
        ]
        results = EvaluationResults(describe_environment("test"), rows)
        variants.append(replace(variant, results=results, divergences={}, training=None, text_scores={}))
    return Grid(tuple(variants), dict(WORLD_KINDS))


def verdicts(grid: Grid) -> str:
    """On the claim, from the cells alone: fits of laws that are flat take long."""
    panels = [Panel(kind, reads, tuple(grid.cells(reads, kind))) for kind in grid.kinds for reads in grid.families]
    best = [one for panel in panels for one in best_for_budgets(panel, Costs(grid, 4, 3), "llm")]
    return " ".join(claim_verdicts(panels, best))


def test_the_claim_is_confirmed_where_it_holds_and_denied_where_it_does_not(finished):
    def as_claimed(kind, size, m, reads):
        return 0.4 * (size / 2760) ** -0.9 if kind == "look-up" else 0.9 * m**-0.5 * (size / 2760) ** -0.05

    said = verdicts(grid_of(finished, as_claimed))
    assert said.count("question: reproduced (few tokens for look-up questions: yes; a larger LLM for them: yes") == 2
    assert said.count("Few tokens (at most 4 of 32 at every budget): yes") == 2
    assert said.count("A larger LLM helps at m = 1: yes") == 2
    assert said.count("Many tokens (at least 16 of 32 at the largest budget): yes") == 2

    def opposite(kind, size, m, reads):
        return 0.9 * m**-0.5 if kind == "look-up" else 0.5

    said = verdicts(grid_of(finished, opposite))
    assert said.count("question: not reproduced (few tokens for look-up questions: no; a larger LLM for them: no") == 2
    assert said.count("Few tokens (at most 4 of 32 at every budget): no") == 2
    assert said.count("A larger LLM helps at m = 1: no") == 2
    assert said.count("Many tokens (at least 16 of 32 at the largest budget): no") == 2


def test_the_choice_of_a_budget_is_that_of_trying_everything(finished):
    def error(kind, size, m, reads):
        return 0.6 * (size / 2760) ** -0.3 * m**-0.2 + 0.05

    grid = grid_of(finished, error)
    summary = summarize_grid(grid, 4, 3)
    costs = Costs(grid, 4, 3)
    panel = summary.panels[0]
    assert panel.fit.alpha == pytest.approx(0.3, abs=0.02)
    assert panel.fit.beta == pytest.approx(0.2, abs=0.02)
    for best in best_for_budgets(panel, costs, "all"):
        options = [
            (float(panel.fit.error(size / 1e9, m)), size, m)
            for size in {cell.llm_parameters for cell in panel.cells}
            for m in range(1, 33)
            if costs(True, size, m, "all") <= best.budget * (1 + 1e-9)
        ]
        assert (best.error, best.llm_parameters, best.num_visual_tokens) == pytest.approx(min(options))
        cells = [
            c
            for c in panel.cells
            if costs(True, c.llm_parameters, c.num_visual_tokens, "all") <= best.budget * (1 + 1e-9)
        ]
        assert best.measured_error == pytest.approx(min(1 - c.score for c in cells))


def test_one_language_model_gives_curves_and_says_that_no_law_was_fitted(finished):
    whole = read_grid_folder(finished / "variants")
    one = Grid(tuple(v for v in whole.variants if v.llm_parameters == whole.variants[0].llm_parameters), whole.kinds)
    summary = summarize_grid(one, 4, 3)
    assert all(panel.fit is None for panel in summary.panels)
    assert all("no law fitted" in line for line in summary.laws)
    assert claim_verdicts(summary.panels, summary.best)
    assert isinstance(one.variants[0], GridVariant)
    assert set(TASKS) == {score.task for score in one.variants[0].results.scores}


def test_the_folder_of_a_lab_is_one_that_the_other_commands_read(folder):
    assert run("--output", folder, "--report").exit_code == 0
    result = CliRunner().invoke(app, ["scaling", "report", str(folder)])
    assert "nothing to report (lab-grid.csv, look-up with the question," in str(result.exception)  # 4 cells each
    table = folder / "lab-grid.csv"  # as of a lab that has learned: flat scores take a fit long
    first = table.read_text().splitlines()[0]
    tasks = ("dense without the question", "look-up with the question")
    rows = [
        f"{task},{n},{m},{1 - 0.5 * n**-0.1 * m**-0.3:.6f},0.01,x" for task in tasks for n in (1, 2) for m in (1, 2, 4)
    ]
    table.write_text("\n".join([first, *rows]) + "\n")
    result = CliRunner().invoke(app, ["scaling", "report", str(folder), "--resamples", "20"])
    assert result.exit_code == 0, result.exception
    assert (
        "Tokens against parameters: lab-grid.csv, dense without the question" in (folder / "scaling.html").read_text()
    )
    command = ["scaling", "optimal", str(folder / "lab-grid.csv"), "--task", "look-up with the question"]
    assert "sum of squared errors" in CliRunner().invoke(app, command).stdout


def test_a_worker_whose_parent_is_gone_ends_at_once(folder):
    shutil.rmtree(folder / "variants" / "llm16-question")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [
        sys.executable,
        "-m",
        "fusedvlm.lab.lab_worker",
        str(folder),
        "--command",
        "x",
        "--parent",
        str(gone.pid),
    ]
    assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 1
    assert not (folder / "variants" / "llm16-question").exists()

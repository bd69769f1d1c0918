"""The paper's fifteen benchmarks: VLMEvalKit's own prompts and scores for the same predictions, to the last digit."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from fusedvlm.evaluation.tasks.paper_benchmarks import BENCHMARKS, COGNITION, PERCEPTION, Hallusion, paper_task
from fusedvlm.evaluation.tasks.record_files import RecordFile
from fusedvlm.evaluation.tasks.task import judge
from fusedvlm.scaling import read_scores
from fusedvlm.tests.evaluation.toys import hallusion_rows, write_benchmarks, write_tsv, yes_no_rows
from fusedvlm.tests.evaluation.vlmeval_parity import COUNT, predictions

RECORDED = json.loads((Path(__file__).parent / "vlmeval_scores.json").read_text(encoding="utf-8"))
PYTHON = Path(os.environ.get("FUSEDVLM_VLMEVAL", ".venv-vlmeval/bin/python"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("toys"), count=COUNT)


def our_numbers(folder: Path, name: str) -> dict:
    """Prompts and scores as `vlmeval_parity` prints VLMEvalKit's."""
    task = paper_task(folder / f"{name}.tsv")
    said = predictions(name, list(task.records()))
    judged = [judge(task, record, said[record.index]) for record in task.records()]
    prompts = {record.index: task.prompt(record) for record in task.records()}
    return {"prompts": prompts, "scores": {metric.name: metric.value for metric in task.metrics(judged)}}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_and_scores_are_those_that_vlmevalkit_gave(folder, name):
    found, recorded = our_numbers(folder, name), RECORDED["benchmarks"][name]
    assert found["prompts"] == recorded["prompts"]
    assert found["scores"] == pytest.approx(recorded["scores"], rel=1e-12)
    assert any(value not in (0, 100) for value in recorded["scores"].values())  # a comparison that can fail


def test_the_metrics_are_the_papers_and_have_an_error_or_a_reason(folder):
    reported: dict[str, set[str]] = {}
    for record in read_scores("paper"):
        reported.setdefault(record.benchmark, set()).add(record.metric)
    assert reported == {name: set(benchmark.metrics) for name, benchmark in BENCHMARKS.items()}
    for name in BENCHMARKS:
        task = paper_task(folder / f"{name}.tsv")
        metrics = task.metrics([judge(task, record, "Yes") for record in task.records()])
        assert tuple(metric.name for metric in metrics) == BENCHMARKS[name].metrics
        assert [metric.is_primary for metric in metrics] == [True] + [False] * (len(metrics) - 1)
        assert all(metric.standard_error is not None or metric.error_note for metric in metrics)


def test_the_papers_caps_and_a_mark_where_the_data_are_not_official(folder, monkeypatch):
    caps = {name: paper_task(folder / f"{name}.tsv").max_new_tokens for name in BENCHMARKS}
    assert {name: cap for name, cap in caps.items() if cap != 32} == {
        "TextVQA_VAL": 10, "ChartQA_TEST": 100, "OCRVQA_TESTCORE": 100, "OCRBench": 512,
    }  # fmt: skip
    assert paper_task(folder / "POPE.tsv").facts()["is_official"] is False
    md5 = RecordFile("POPE", str(folder / "POPE.tsv")).checksums()["md5"]
    monkeypatch.setitem(BENCHMARKS, "POPE", BENCHMARKS["POPE"].__class__(**{**vars(BENCHMARKS["POPE"]), "md5": md5}))
    assert paper_task(folder / "POPE.tsv").facts()["is_official"] is True


def test_mme_counts_pictures_whose_questions_are_all_right(folder):
    task = paper_task(folder / "MME.tsv")
    categories = len(PERCEPTION) + len(COGNITION)
    everything = task.metrics([judge(task, record, record.answers[0]) for record in task.records()])
    assert [(metric.value, metric.scale) for metric in everything] == [
        (200 * categories, "0..2800"), (2000, "0..2000"), (800, "0..800"),
    ]  # fmt: skip
    half = task.metrics([judge(task, record, "Yes") for record in task.records()])
    assert half[0].value == 50 * categories  # every second answer, and no picture's both
    assert half[0].standard_error == 0


def test_what_groups_questions_must_be_there(folder, tmp_path):
    rows = [{**row, "category": "count"} for row in yes_no_rows(2)]
    with pytest.raises(ValueError, match="MME pairs questions by image_path"):
        paper_task(write_tsv(tmp_path / "MME.tsv", rows)).records()
    rows = hallusion_rows()
    rows[0]["index"] = "1"
    task = paper_task(write_tsv(tmp_path / "HallusionBench.tsv", rows))
    assert isinstance(task, Hallusion)
    with pytest.raises(ValueError, match="index '1' must be category_subcategory_visual_set_figure_question"):
        task.metrics([judge(task, record, "Yes") for record in task.records()])


def test_f1_of_nothing_is_zero_and_says_so(folder):
    task = paper_task(folder / "POPE.tsv")
    f1, accuracy, precision, recall = task.metrics([judge(task, record, "no") for record in task.records()])
    assert (f1.value, precision.value, recall.value) == (0, 0, 0)
    assert (precision.count, precision.error_note) == (0, 'no answer was "yes"')
    assert accuracy.value == pytest.approx(50, abs=10)


@pytest.mark.skipif(not PYTHON.exists(), reason="VLMEvalKit is not installed: make env-vlmeval")
def test_the_installed_vlmevalkit_gives_the_recorded_numbers(tmp_path):
    """Its version is what the record says: a newer one that scores otherwise is found here."""
    command = [str(PYTHON), "-m", "fusedvlm.tests.evaluation.vlmeval_parity", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for name, numbers in RECORDED["benchmarks"].items():
        assert found["benchmarks"][name]["prompts"] == numbers["prompts"]
        assert found["benchmarks"][name]["scores"] == pytest.approx(numbers["scores"])

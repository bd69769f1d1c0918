"""VLMEvalKit and lmms-eval: their own runs where they are installed, and a stand-in that speaks the bridge's protocol."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.evaluation import EvaluationResults
from fusedvlm.evaluation.harnesses import lmms_run, vlmeval_tasks
from fusedvlm.evaluation.harnesses.lmms_run import score_rows
from fusedvlm.evaluation.tasks.paper_benchmarks import BENCHMARKS
from fusedvlm.tests.evaluation.toys import write_benchmarks
from fusedvlm.tests.tiny import picture

VLMEVAL = Path(os.environ.get(vlmeval_tasks.VARIABLE, ".venv-vlmeval/bin/python")).absolute()
LMMS = Path(os.environ.get(lmms_run.VARIABLE, ".venv-lmms/bin/python")).absolute()
STAND_IN = """#!{python}
import json, sys
for line in sys.stdin:
    command = json.loads(line)
    name, folder, reply = command["name"], command["folder"], {{}}
    if name == "HALF":
        sys.exit("half of it is missing")
    if command["action"] == "export":
        head = {{"kind": "Y/N", "edition": "ms-vlmeval", "version": "9.9", "data_sha256": "ab", "is_official": None}}
        rows = [{{"index": str(n), "images": ["{picture}"], "prompt": f"is {{n}} red?", "question": ""}} for n in range(4)]
        open(f"{{folder}}/{{name}}.requests.jsonl", "w").write("\\n".join(map(json.dumps, [head, *rows])))
    elif name == "MMStar":
        reply = {{"error": "KeyError: no column l2-category"}}
    else:
        said = json.load(open(f"{{folder}}/{{name}}.said.json"))
        found = {{m: {{"Overall": len(answers), "acc": 1.0, "precision": 2.0, "recall": 3.0}} for m, answers in said.items()}}
        json.dump(found, open(f"{{folder}}/{{name}}.scores.json", "w"))
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def place(family, tmp_path, monkeypatch):
    """The tiny family, toys, and a stand-in for VLMEvalKit's Python."""
    shutil.copytree(family, tmp_path / "family")
    write_benchmarks(tmp_path / "LMUData")
    picture(0).save(tmp_path / "a.png")
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable, picture=tmp_path / "a.png"))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(vlmeval_tasks.VARIABLE, str(script))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments: str):
    data = [] if "lmms-eval" in arguments else ["--data", "LMUData"]
    return CliRunner().invoke(app, ["evaluate", "family", *data, "--m", "1,7", "--output", "out", *arguments])


def test_vlmevalkit_gives_questions_and_scores_and_we_the_answers(place):
    done = evaluate("--harness", "vlmevalkit", "--tasks", "POPE")
    assert done.exit_code == 0, done.exception
    results = EvaluationResults.load(Path("out/results.json"))
    assert [(row.label, row.score, row.count) for row in results.scores[:2]] == [
        ("POPE Overall [vlmevalkit]", 4.0, 4), ("POPE acc [vlmevalkit]", 1.0, 4),
    ]  # fmt: skip
    assert len(results.scores) == 8
    row = results.scores[0]
    assert (row.standard_error, row.error_note, row.scale) == (None, "VLMEvalKit states none", "0..100")
    source = results.sources[row.source]
    assert (source.harness, source.harness_version, source.settings["max_new_tokens"]) == (
        "vlmevalkit",
        "ms-vlmeval 9.9",
        32,
    )
    # Ours of the same benchmark stand beside it, in rows of their own.
    assert evaluate("--tasks", "POPE").exit_code == 0
    labels = {row.label for row in EvaluationResults.load(Path("out/results.json")).scores}
    assert {"POPE Overall [vlmevalkit]", "POPE Overall (not the official data)"} <= labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "MMStar"], "VLMEvalKit failed to score MMStar: KeyError: no column l2-category"),
        (["--tasks", "HALF"], "VLMEvalKit failed to export HALF: it ended, saying half of it is missing"),
        (["--tasks", "mine.tsv"], "takes names of its benchmarks, not 'mine.tsv'"),
        (["--tasks", "POPE", "--limit", "3"], "scores whole sets"),
    ],
)
def test_what_vlmevalkit_did_not_finish_is_no_score(place, arguments, message):
    done = evaluate("--harness", "vlmevalkit", *arguments)
    assert message in str(done.exception)
    assert not Path("out/results.json").exists()


def test_a_tool_that_is_not_there_is_named_with_its_make_target(place, monkeypatch):
    monkeypatch.setenv(vlmeval_tasks.VARIABLE, "nowhere")
    assert "make env-vlmeval" in str(evaluate("--harness", "vlmevalkit", "--tasks", "POPE").exception)
    monkeypatch.setenv(lmms_run.VARIABLE, "nowhere")
    assert "make env-lmms" in str(evaluate("--harness", "lmms-eval", "--tasks", "pope").exception)
    done = evaluate("--harness", "lmms-eval", "--tasks", "pope", "--max-new-tokens", "3", "--against", "paper")
    assert "leave --against, --max-new-tokens out" in str(done.exception)
    assert "there are local, vlmevalkit and lmms-eval" in str(
        evaluate("--harness", "mine", "--tasks", "pope").exception
    )


def test_scores_of_lmms_eval_keep_their_errors_and_say_whose_they_are():
    found = {
        "results": {"pope": {"alias": "pope", "acc,none": 0.8, "acc_stderr,none": 0.1, "f1,none": 0.7, "f1_stderr,none": "N/A"}},
        "n-samples": {"pope": {"original": 90, "effective": 20}},
    }  # fmt: skip
    one, two = score_rows(found, 8, "here", 20)
    assert (one.label, one.score, one.standard_error, one.count) == ("pope acc [lmms-eval] (first 20)", 0.8, 0.1, 20)
    assert (two.standard_error, two.error_note, two.is_primary) == (None, "lmms-eval states none", False)
    with pytest.raises(RuntimeError, match="gave no number for pope at m=8"):
        score_rows({"results": {"pope": {"alias": "pope", "acc,none": "N/A"}}}, 8, "here")


@pytest.mark.skipif(not VLMEVAL.exists(), reason="VLMEvalKit is not installed: make env-vlmeval")
@pytest.mark.timeout(900)
def test_all_fifteen_by_vlmevalkit_itself_score_as_here(place, monkeypatch):
    monkeypatch.setenv(vlmeval_tasks.VARIABLE, str(VLMEVAL))
    for harness in ("vlmevalkit", "local"):
        done = evaluate("--harness", harness, "--tasks", ",".join(BENCHMARKS), "--max-new-tokens", "4")
        assert done.exit_code == 0, done.exception
    scores: dict[str, dict[tuple, float]] = {"vlmevalkit": {}, "local": {}}
    for row in EvaluationResults.load(Path("out/results.json")).scores:
        scores[row.harness][row.task, row.metric, row.num_visual_tokens] = row.score
        assert "not the official data" in row.note
    assert len(scores["local"]) == 52
    # Random weights say control characters, which VLMEvalKit's Excel files turn into texts with digits: OCRBench finds
    # those. What it gives for readable answers is in test_paper_benchmarks.py.
    compared = {key: value for key, value in scores["local"].items() if key[0] != "OCRBench"}
    assert {key: scores["vlmevalkit"][key] for key in compared} == pytest.approx(compared)


@pytest.mark.skipif(not LMMS.exists(), reason="lmms-eval is not installed: make env-lmms")
@pytest.mark.timeout(900)
def test_lmms_eval_runs_its_own_task_and_answers_every_m_at_once(place, monkeypatch):
    monkeypatch.setenv(lmms_run.VARIABLE, str(LMMS))
    rows = [{"image": picture(n), "question": f"what is {n}?", "answer": "a"} for n in range(3)]
    DatasetDict({"test": Dataset.from_list(rows).cast_column("image", Image())}).save_to_disk("data")
    Path("tasks").mkdir()
    Path("tasks/toy.yaml").write_text(
        f"task: toy\ndataset_path: {Path('data').absolute()}\ndataset_kwargs: {{load_from_disk: True}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_visual: !function utils.visual\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: answer\nprocess_results: !function utils.process\ngeneration_kwargs: {max_new_tokens: 4}\n"
        "metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]\n"
    )
    Path("tasks/utils.py").write_text(
        "def visual(doc):\n    return [doc['image'].convert('RGB')]\n\n\n"
        "def process(doc, results):\n    return {'length': float(len(results[0]))}\n"
    )
    done = evaluate("--harness", "lmms-eval", "--tasks", "toy,tasks", "--device", "cpu")
    assert done.exit_code == 0, done.exception
    rows = EvaluationResults.load(Path("out/results.json")).scores
    assert [(row.label, row.num_visual_tokens) for row in rows] == [
        ("toy length [lmms-eval]", 1),
        ("toy length [lmms-eval]", 7),
    ]
    (journal,) = Path("out/evaluation/lmms_eval").glob("toy.journal.jsonl")
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(entries) == 6
    for row in rows:
        lengths = [len(entry["answer"]) for entry in entries if entry["m"] == row.num_visual_tokens]
        assert row.score == pytest.approx(sum(lengths) / 3)

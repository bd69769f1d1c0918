"""`fusedvlm evaluate` on a family, and docs/evaluation.md as it is written."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import fusedvlm
from fusedvlm.cli import app
from fusedvlm.evaluation import EvaluationResults, TaskScore
from fusedvlm.evaluation.answers.answer_files import read_answers
from fusedvlm.evaluation.answers.model_sources import find_variants, share_counts
from fusedvlm.scaling.against_paper import against_paper
from fusedvlm.tests import fork_server
from fusedvlm.tests.evaluation.conftest import FAMILY
from fusedvlm.tests.evaluation.one_share import ask_one_share
from fusedvlm.tests.evaluation.toys import choice_rows, write_benchmarks, write_tsv
from fusedvlm.tests.pages import Page, blocks_of, names_of
from fusedvlm.tests.processes import run_ranks
from fusedvlm.tests.tiny import picture

PAGE = Path(fusedvlm.__file__).parent.parent / "docs" / "evaluation.md"
BLOCKS = blocks_of(PAGE, "bash|python|json") if PAGE.exists() else []


@pytest.fixture
def place(family, tmp_path, monkeypatch):
    """A folder with the family as runs/quickstart and toys of the benchmarks as LMUData."""
    shutil.copytree(family, tmp_path / "runs" / "quickstart")
    write_benchmarks(tmp_path / "LMUData", ["POPE", "TextVQA_VAL", "MMStar"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert (result.exit_code != 0) == bool(code), (result.exception, result.output[-2000:])
    return result if code == 0 else result.exception


def test_a_family_at_every_m_by_one_command(place):
    told = json.loads(evaluate("runs/quickstart", "--tasks", "POPE", "--data", "LMUData", "--json").stdout)
    results = EvaluationResults.load(Path("runs/quickstart/results.json"))
    assert [row["task"] for row in told["scores"]] == ["POPE"] * 12
    assert {(row.metric, row.num_visual_tokens) for row in results.scores} == {
        (metric, m) for metric in ("Overall", "acc", "precision", "recall") for m in FAMILY
    }
    assert {row.note for row in results.scores} == {"not the official data"}
    text = evaluate("runs/quickstart", "--tasks", "POPE", "--data", "LMUData", "--m", "1,3").stdout
    assert text.splitlines()[0].split() == ["m=1", "m=3", "scale", "questions"]
    again = EvaluationResults.load(Path("runs/quickstart/results.json"))
    assert {row.num_visual_tokens for row in again.scores} == {*FAMILY, 3}


def test_a_variant_inside_a_family_leaves_its_scores_where_cards_read_them(place):
    evaluate("runs/quickstart", "--tasks", "MMStar", "--data", "LMUData", "--m", "1")
    evaluate("runs/quickstart/fusedvlm-m7", "--tasks", "MMStar", "--data", "LMUData")
    results = EvaluationResults.load(Path("runs/quickstart/results.json"))
    assert sorted(row.num_visual_tokens for row in results.scores) == [1, 7]
    assert not Path("runs/quickstart/fusedvlm-m7/results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/quickstart", "--tasks", "POPE", "--m", "13"], "out of range"),
        (["runs/quickstart", "--tasks", "POPE", "--m", "1,x"], "no whole number"),
        (["runs/quickstart", "--tasks", "PopE"], "is no benchmark"),
        (["runs/nothing", "--tasks", "POPE"], "does not exist"),
        (["LMUData", "--tasks", "POPE"], "neither a variant"),
        (["runs/quickstart", "--tasks", "POPE", "--preset", "mine"], "--preset mine: there are paper and plain"),
        (["runs/quickstart", "--tasks", "POPE", "--revision", "main"], "has no revisions"),
        (["runs/quickstart", "--tasks", "POPE,LMUData/POPE.tsv:anls"], "Two tasks are called 'POPE'"),
    ],
)
def test_wrong_use_is_said_before_anything_is_asked(place, arguments, message):
    error = evaluate(*arguments, "--data", "LMUData", code=2)
    assert isinstance(error, ValueError)
    assert message in str(error)
    assert not list(place.rglob("*.journal.jsonl"))


def test_a_family_of_different_weights_answers_each_at_its_own_m(place):
    variants = find_variants("runs/quickstart")
    assert [(variant.num_visual_tokens, counts) for variant, counts in share_counts(variants, None)] == [
        (12, [1, 7, 12])
    ]
    path = Path("runs/quickstart/fusedvlm-m7/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "initializer_range": 0.03}))
    variants = find_variants("runs/quickstart")
    assert [counts for _, counts in share_counts(variants, None)] == [[1], [7], [12]]
    with pytest.raises(ValueError, match="--m 3: the variants of this family have different weights"):
        share_counts(variants, [3])


@pytest.mark.timeout(300)
def test_a_run_that_was_killed_goes_on_where_it_was(place):
    """Signal 9 as soon as the first answers are on the disk; the same command gives what an undisturbed one gives."""
    write_tsv(Path("many.tsv"), choice_rows(40))
    words = shlex.split(
        "evaluate runs/quickstart --tasks many.tsv --m 1,12 --batch-size 2 --max-new-tokens 4 --output out"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([fork_server.executable("fusedvlm"), *words], env=environment, stderr=subprocess.DEVNULL)
    journal = Path("out/evaluation/many.journal.jsonl")
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = journal.read_bytes()
    assert known
    told = evaluate(*words[1:]).stdout
    assert journal.read_bytes().startswith(known[: known.rindex(b"\n") + 1])  # nothing was thrown away
    assert len(journal.read_text().splitlines()) == 80  # and nothing asked twice
    words[-1] = "undisturbed"
    assert evaluate(*words[1:]).stdout == told


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(family, tmp_path_factory):
    """Everything the page takes for granted, and its blocks."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(family, folder / "runs" / "quickstart")
    write_benchmarks(folder / "LMUData", ["POPE", "TextVQA_VAL", "MMStar"])
    picture(0).save(folder / "scene.png")
    names: dict = {}

    def run_block(language: str, source: str) -> None:
        before = os.getcwd()
        os.chdir(folder)
        try:
            if language == "json":
                return
            if language == "python":
                exec(compile(source, str(PAGE), "exec"), names)
                return
            for line in source.strip().splitlines():
                result = CliRunner().invoke(app, shlex.split(line)[1:])
                assert result.exit_code == 0, (line, result.exception, result.output[-1000:])
                assert result.stdout.strip()
        finally:
            os.chdir(before)

    rows = next(source for language, source in BLOCKS if language == "json")
    (folder / "mine.jsonl").write_text(rows)
    return Page(BLOCKS, run_block)


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=names_of(BLOCKS))
def test_block(page, number):
    page.run(number)


def test_processes_that_meet_over_gloo_score_as_one_does(place):
    assert run_ranks(2, ask_one_share, str(place)) == [10, 0]
    evaluate("runs/quickstart", "--tasks", "LMUData/MMStar.tsv,LMUData/POPE.tsv", "--m", "1,12", "--output", "alone",
             "--max-new-tokens", "4", "--device", "cpu")  # fmt: skip
    alone, ranks = (EvaluationResults.load(Path(name, "results.json")) for name in ("alone", "ranks"))
    assert ranks.scores == alone.scores
    for path in Path("alone/evaluation").glob("*.gz"):
        assert path.read_bytes() == (Path("ranks/evaluation") / path.name).read_bytes()


# -- the chain: scores to laws, plans, cards and the Hub's metadata ----------------------------------------------------


def test_scores_go_beside_the_papers(place):
    arguments = ["runs/quickstart", "--tasks", "POPE", "--data", "LMUData", "--m", "1,8", "--against", "paper"]
    document = json.loads(evaluate(*arguments, "--json").stdout)["against_paper"]
    assert document["fusion_inputs"] == "vision+question+queries"
    papers = {(cell["metric"], cell["num_visual_tokens"]): cell["paper"] for cell in document["cells"]}
    assert len(papers) == 8
    assert (papers["Overall", 1], papers["Overall", 8]) == (58.113, 77.749)
    assert evaluate(*arguments).stdout.splitlines()[-1].endswith(" of 8 cells differ by more than the error.")
    for tasks, against, message in (("POPE", "me", "there is only paper"), ("mine.tsv", "paper", "mine is none of")):
        write_tsv(place / "mine.tsv", choice_rows(2))
        error = evaluate("runs/quickstart", "--tasks", tasks, "--data", "LMUData", "--against", against, code=2)
        assert message in str(error)


def test_time_and_memory_of_every_m(place):
    ask = [
        "runs/quickstart",
        "--tasks",
        "POPE",
        "--data",
        "LMUData",
        "--m",
        "1,12",
        "--measure",
        "2",
        "--max-new-tokens",
        "2",
    ]
    lines = evaluate(*ask).stdout.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["m=1", "m=12"]
    assert lines[-1].endswith("(2 pictures)")
    rows = EvaluationResults.load(Path("runs/quickstart/results.json")).latencies
    assert [(row.num_visual_tokens, row.count, row.peak_memory_bytes) for row in rows] == [(1, 2, None), (12, 2, None)]
    assert all(0 < row.time_to_first_token < row.seconds_per_answer for row in rows)
    assert rows[0].tokens_per_second == pytest.approx(31 / (rows[0].seconds_per_answer - rows[0].time_to_first_token))
    error = evaluate(*ask, "--base-url", "http://127.0.0.1:9/v1", code=2)
    assert "leave --base-url out" in str(error)


@pytest.mark.parametrize(("error", "is_different"), [(3.0, False), (1.0, True), (None, None)])
def test_a_difference_counts_beyond_the_error_of_both(error, is_different):
    (cell,) = against_paper([TaskScore("POPE", 8, 77.749 + 5, 100, error, metric="Overall")])
    assert cell.is_different is is_different
    assert cell.difference == pytest.approx(5)


def test_scores_feed_laws_reports_cards_and_metadata_without_a_hand_between(place):
    """Right answers are the model's own, so that some are right at every m."""
    rows = [
        {"image": row["image"], "question": row["question"], "answer": "?"}
        for row in choice_rows(8)
        if len(row["image"]) > 9
    ]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ask = ["runs/quickstart", "--tasks", "own.jsonl:exact_match", "--max-new-tokens", "3"]
    evaluate(*ask, "--output", "first")
    (answers,) = Path("first/evaluation").glob("*.gz")
    said: dict[str, set[str]] = {}
    for entry in read_answers(answers):
        said.setdefault(entry["index"], set()).add(entry["answer"] or "?")
    rows = [{**row, "answer": sorted(said[str(number)]) if number < 5 else "?"} for number, row in enumerate(rows)]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate(*ask)
    results = EvaluationResults.load(Path("runs/quickstart/results.json"))
    assert [(row.label, row.count) for row in results.scores] == [("own exact_match", 7)] * 3
    assert len(results.question_scores["own exact_match"][7]) == 7

    run = CliRunner()
    fitted = run.invoke(app, ["scaling", "fit", "runs/quickstart/results.json", "--json"])
    assert fitted.exit_code == 0, fitted.exception
    (fit,) = json.loads(fitted.stdout)["fits"] if "fits" in fitted.stdout else json.loads(fitted.stdout)
    assert fit["m"] == [1, 7, 12]
    assert fit["standard_error"] == pytest.approx([row.standard_error for row in results.scores])
    reported = run.invoke(app, ["scaling", "report", "runs/quickstart", "--output", "report.html"])
    assert reported.exit_code == 0, reported.exception
    assert "own" in Path("report.html").read_text()
    planned = run.invoke(
        app, ["plan", "--budget", "2 TFLOPs", "--fits", "runs/quickstart/results.json", "--benchmark", "own"]
    )
    assert planned.exit_code == 0, planned.exception

    carded = run.invoke(
        app, ["card", "runs/quickstart/fusedvlm-m7", "--license", "apache-2.0", "--llm-license", "apache-2.0"]
    )
    assert carded.exit_code == 0, carded.exception
    card = ModelCard.load(Path("runs/quickstart/fusedvlm-m7/README.md"))
    (entry,) = card.data.eval_results
    assert (entry.dataset_name, entry.metric_name, entry.metric_type) == (
        "own exact_match",
        "exact_match",
        "exact_match",
    )
    assert entry.metric_value == results.scores[1].score
    assert entry.metric_args["harness"] == f"local {fusedvlm.__version__}, preset plain, cap 3"
    assert entry.metric_args["standard_error"] == results.scores[1].standard_error
    score, error = results.scores[1].score, results.scores[1].standard_error
    assert f"{score:.3f} ± {error:.3f}" in card.content

"""`fusedvlm compare` from nothing to a page; killed and continued; refused in one line."""

import dataclasses
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.comparison import run_comparison
from fusedvlm.comparison.entrants import all_entrants, parse_entrant, supported_counts, training_jobs
from fusedvlm.comparison.plan import GLANCE
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import CONNECTORS

NAMES = ("fused", "dense+visionzip")


def compare(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path, glance):
    """A run folder whose shared world is there."""
    shared, _ = glance
    shutil.copytree(shared.folder, tmp_path / "run" / "world")
    return tmp_path / "run"


def run(folder, *names, **options):
    extra = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return compare(*(names or NAMES), "--preset", "glance", "--output", folder, "--json", *extra)


def stamps(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for kind in ("cells", "weights") for path in (folder / kind).iterdir()}


def test_from_names_to_a_page_and_nothing_is_done_twice(folder, tmp_path):
    record = tmp_path / "record.md"
    result = run(folder, record=record)
    assert result.exit_code == 0, (result.exception, result.stderr[-2000:])
    document = json.loads(result.stdout)
    found = {(point["entrant"], point["num_visual_tokens"]) for point in document["points"]}
    assert found == {(name, m) for name in NAMES for m in (1, 4, 16)}
    assert document["reference"] == "fused"
    page = (folder / "comparison.html").read_text()
    assert "scores mean nothing" in page
    assert "dense+visionzip" in record.read_text()
    for point in document["points"]:
        assert point["llm_flops"] < point["total_flops"]
        assert point["training_tflops"] >= GLANCE.training_tflops
        assert point["training_tflops"] < 1.2 * GLANCE.training_tflops
    before = stamps(folder)
    assert len(before) == 6 + 2 * 2
    assert run(folder).exit_code == 0
    assert stamps(folder) == before

    # One cell gone: it alone is measured again, with the weights that are there, and says the same.
    lost = folder / "cells" / "fused-m4-s0.json"
    scores = json.loads(lost.read_text())["scores"]
    lost.unlink()
    assert run(folder).exit_code == 0
    assert json.loads(lost.read_text())["scores"] == scores
    assert {name for name, stamp in stamps(folder).items() if before[name] != stamp} == {lost.name}

    # The page of an unfinished folder says what is missing.
    kept = lost.read_text()
    lost.unlink()
    result = compare("--output", folder, "--report", "--json")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert len(document["points"]) == 5
    assert any("fused at m = 4, seed 0: not finished" in note for note in document["notes"])
    assert not lost.exists()
    lost.write_text(kept)

    # A damaged cell is named, not counted.
    lost.write_text(lost.read_text()[:50])
    result = run(folder)
    assert result.exit_code != 0
    assert "fused-m4-s0.json is not a finished cell" in str(result.exception)


def test_a_run_killed_while_training_or_measuring_goes_on(folder, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_comparison, "train_equally", killed)
        assert run(folder, "fused").exit_code != 0
    assert list((folder / "weights").iterdir()) == []
    with monkeypatch.context() as patch:
        real, done = run_comparison.measure_cell, []

        def second_is_killed(*args, **kwargs):
            done.append(args)
            return real(*args, **kwargs) if len(done) == 1 else killed()

        patch.setattr(run_comparison, "measure_cell", second_is_killed)
        assert run(folder, "fused").exit_code != 0
    after = stamps(folder)
    assert sorted(after) == ["fused-m1-s0.json", "fused-m1_4_16-s0.json", "fused-m1_4_16-s0.safetensors"]
    result = run(folder, "fused")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["points"]) == 3
    assert {name: stamp for name, stamp in stamps(folder).items() if name in after} == after


def test_a_folder_without_cells_has_no_page(folder, tmp_path):
    assert "no run folder" in str(compare("--output", tmp_path / "nothing", "--report").exception)
    (folder / "plan.json").write_text(json.dumps(dataclasses.asdict(GLANCE)))
    assert "no finished cell" in str(compare("--output", folder, "--report").exception)


def test_a_folder_belongs_to_one_plan(folder):
    (folder / "plan.json").write_text(json.dumps({"num_images": 5}))
    result = run(folder)
    assert result.exit_code != 0
    assert "other settings" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "Nothing is called 'nothing'"),
        (["fused+visionzip"], "stand behind dense"),
        (["dense+magic"], "stand behind dense"),
        (["fused:speed=3"], "no setting speed"),
        (["fused:fuse_question"], "is not field=value"),
        ([], "Name what to compare"),
        (["fused", "--preset", "huge"], "Unknown preset"),
        (["fused", "--tokens", "1,x"], "between commas"),
        (["fused", "--tokens", "0"], "at least 1"),
        (["fused", "--reference", "pool"], "is not compared"),
        (["dense", "--tokens", "4"], "can give none of m = \\[4\\]"),
        (["dense+average", "--tokens", "8"], "can give none"),
        (["dense+cdpruner"], "text half"),
        (["no/such/folder"], "does not exist"),
        (["fused", "--tflops", "0"], "more than none"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(arguments, says, tmp_path):
    result = compare(*arguments, "--output", tmp_path / "run")
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError)
    assert re.search(says, str(result.exception)), str(result.exception)
    assert "\n" not in str(result.exception)
    assert len(str(result.exception)) <= 300
    assert not (tmp_path / "run" / "world").exists()


def test_the_list_names_every_connector_and_reducer():
    document = json.loads(compare("--list", "--json").stdout)
    assert {row["name"].partition(":")[0] for row in document["connectors"]} == set(CONNECTORS)
    assert {row["name"] for row in document["reducers"]} >= {"dense+visionzip", "dense+vispruner", "dense+cdpruner"}
    text = compare("--list").stdout
    assert "reads the question" in text
    assert "dense+cdpruner" in text


def test_all_has_every_connector_with_and_without_the_question():
    keys = [entrant.key for entrant in all_entrants()]
    assert len(keys) == len(set(keys))
    for name, kind in CONNECTORS.items():
        assert name in keys
        assert (f"{name}:fuse_question=false" in keys) == (kind.reads_question == "optional")
    assert "dense+cdpruner" not in keys


def test_names_are_read_as_they_are_written():
    for key in ("fused", "fused:fuse_question=false", "dense+visionzip", "dense:mlp_layers=1"):
        assert parse_entrant(key).key == key
    assert parse_entrant("fused:fuse_question=false").reads_question is False


def test_nested_connectors_train_once_and_others_for_each_m():
    fused, dense = parse_entrant("fused"), parse_entrant("dense")
    assert training_jobs(fused, GLANCE, supported_counts(fused, GLANCE)[0]) == [(1, 4, 16)]
    counts, refused = supported_counts(dense, GLANCE)
    assert counts == [16]
    assert set(refused) == {1, 4}
    assert "every patch" in refused[1]

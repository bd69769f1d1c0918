"""The strict reader: good files in three formats, and every bad row named."""

import json

import pytest

from fusedvlm.scaling import group_curves, read_scores
from fusedvlm.scaling.score_records import PAPER_SCORES

HEADER = "benchmark,metric,fusion_inputs,m,score\n"


def write(tmp_path, text, name="results.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_papers_scores():
    records = read_scores("paper")
    assert len(records) == 26 * 3 * 10
    assert "JMLR" in PAPER_SCORES.read_text().splitlines()[0] + PAPER_SCORES.read_text().splitlines()[1]
    curves = {curve.name: curve for curve in group_curves(records)}
    assert len(curves) == 78
    pope = curves["POPE/Overall (vision+question+queries)"]
    assert pope.m == [1, 8, 16, 32, 64, 128, 256, 384, 512, 768]
    assert pope.scores[0] == 58.113
    assert pope.scores[-1] == 86.977


def test_csv_keeps_file_row_numbers_and_groups(tmp_path):
    path = write(
        tmp_path,
        "# a source\n" + HEADER + "POPE,acc,vq,8,70\n\nPOPE,acc,vq,1,50.5\nPOPE,acc,vqq,1,51\nPOPE,acc,vqq,2,52\n",
    )
    records = read_scores(path)
    assert [(r.m, r.score, r.place) for r in records[:2]] == [(8, 70.0, "row 3"), (1, 50.5, "row 5")]
    curves = group_curves(records)
    assert [curve.groups for curve in curves] == [(("fusion_inputs", "vq"),), (("fusion_inputs", "vqq"),)]
    assert curves[0].m == [1, 8]


def test_json_list_and_evaluation_results_read_alike(tmp_path):
    rows = [
        {"benchmark": "list", "metric": "score", "num_visual_tokens": m, "score": m / 10, "standard_error": 0.1}
        for m in (1, 2)
    ]
    as_list = write(tmp_path, json.dumps(rows), "rows.json")
    results = {
        "environment": {},
        "latencies": [],
        "scores": [
            {"task": "list", "num_visual_tokens": m, "score": m / 10, "count": 3, "standard_error": 0.1} for m in (1, 2)
        ],
    }
    as_results = write(tmp_path, json.dumps(results), "results.json")
    assert read_scores(as_list) == read_scores(as_results)


def test_ignored_columns_do_not_group(tmp_path):
    path = write(tmp_path, "benchmark,metric,m,score,run\nA,acc,1,3,x\nA,acc,2,4,y\n")
    assert group_curves(read_scores(path, ignore=["run"]))[0].m == [1, 2]
    with pytest.raises(ValueError, match=r"row 2.*Columns that group: run"):
        group_curves(read_scores(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("POPE,acc,vq,1,51", r"row 3: duplicate of row 2 \(POPE/acc \(vq\) at m=1\)"),
        ("POPE,acc,vq,2,0", "row 3: score is '0'"),
        ("POPE,acc,vq,2,-4", "row 3: score is '-4'"),
        ("POPE,acc,vq,2,nan", "row 3: score is 'nan'"),
        ("POPE,acc,vq,2,", "row 3: score is ''"),
        ("POPE,acc,vq,0,51", "row 3: m is '0'"),
        ("POPE,acc,vq,1.5,51", "row 3: m is '1.5'; it is a whole number"),
        ("POPE,acc,vq,2", "row 3: 4 cells for 5 columns"),
        (",acc,vq,2,50", "row 3: benchmark is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = write(tmp_path, HEADER + "POPE,acc,vq,1,50\n" + row + "\n")
    with pytest.raises(ValueError, match=message):
        read_scores(path)


def test_a_single_m_is_named(tmp_path):
    path = write(tmp_path, HEADER + "A,acc,vq,1,50\nA,acc,vq,2,50\nB,acc,vq,4,50\n")
    with pytest.raises(ValueError, match=r"B/acc \(vq\) \(row 4\): only 1 number of visual tokens"):
        group_curves(read_scores(path))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "r.csv", "empty"),
        (HEADER, "r.csv", "no scores"),
        ("benchmark,m,score\n", "r.csv", "no column metric"),
        ("benchmark,metric,m,score,score\n", "r.csv", "column score appears twice"),
        ("{]", "r.json", "not JSON"),
        ('{"a": 1}', "r.json", "expected a list"),
        ('[{"m": 1}]', "r.json", "row 1: no column benchmark, metric, score"),
        ('{"scores": [{"task": "x"}]}', "r.json", "row 1: no num_visual_tokens, score"),
    ],
)
def test_bad_files_are_named(tmp_path, text, name, message):
    with pytest.raises(ValueError, match=message):
        read_scores(write(tmp_path, text, name))


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"r\.csv: not UTF-8 text"):
        read_scores(tmp_path / "r.csv")


def test_exclusions_by_name():
    rule = "benchmark=RealWorldQA,fusion_inputs=vision+queries (ft),m=384|512"
    curves = {curve.name: curve for curve in group_curves(read_scores("paper"), [rule])}
    left = curves["RealWorldQA/Overall (vision+queries (ft))"]
    assert [point.m for point in left.excluded] == [384, 512]
    assert 384 not in left.m
    assert len(left.m) == 8
    assert not curves["RealWorldQA/Overall (vision+question+queries)"].excluded


@pytest.mark.parametrize("rule", ["benchmark=Nothing", "m=3"])
def test_exclusion_without_a_point(rule):
    with pytest.raises(ValueError, match="matches no point"):
        group_curves(read_scores("paper"), [rule])


@pytest.mark.parametrize("rule", ["RealWorldQA", "bench=RealWorldQA"])
def test_exclusion_that_is_no_rule(rule):
    with pytest.raises(ValueError, match="not column=value with a column of benchmark, metric, m, fusion_inputs"):
        group_curves(read_scores("paper"), [rule])


def test_a_whole_benchmark_can_be_excluded():
    curves = group_curves(read_scores("paper"), ["benchmark=MME|POPE"])
    assert len(curves) == 78 - 3 * 7
    assert not {"MME", "POPE"} & {curve.benchmark for curve in curves}
    with pytest.raises(ValueError, match="only 1 number of visual tokens is left"):
        group_curves(read_scores("paper"), ["benchmark=MME,m=8|16|32|64|128|256|384|512|768"])
    with pytest.raises(ValueError, match="leave no point"):
        group_curves(read_scores("paper"), ["m=1|8|16|32|64|128|256|384|512|768"])

"""Intervals say what they should; a figure and a page show every point, in the page's own colours."""

import json
from functools import lru_cache

import numpy as np
import pytest

from fusedvlm.comparison.cells import Cell
from fusedvlm.comparison.comparison_figures import INK, PANELS, draw_panel, nice_ticks, styles
from fusedvlm.comparison.comparison_page import HEADER, markdown_record, text_table, write_page
from fusedvlm.comparison.summary import (
    Interval,
    Point,
    Summary,
    check_same_tasks,
    read_given,
    resampled_means,
    summarize_cells,
    verdicts,
)
from fusedvlm.evaluation import EvaluationResults, Latency, TaskScore, describe_environment
from fusedvlm.tests.phone import assert_fits_a_phone

TASKS = ("colour", "shape", "letter", "list", "read")


def cell(entrant: str, m: int, seed: int = 0, share: float = 0.5, questions: int = 200) -> Cell:
    generator = np.random.default_rng([seed, 5])
    drawn = generator.random((len(TASKS), questions))  # the same questions are hard for everybody
    return Cell(
        entrant=entrant,
        num_visual_tokens=m,
        seed=seed,
        scores={task: (row < share).astype(float).tolist() for task, row in zip(TASKS, drawn, strict=True)},
        flops={"tower": 3e6, "connector": 1e6, "llm": 1e5 * m},
        latency_ms={"median": 2.0 + m / 10, "low": 1.9, "high": 2.5 + m / 10, "repeats": 5.0},
        training={"tflops": 1.0, "steps": 100, "trained_parameters": 1000},
        environment={"command": "fusedvlm compare", "date": "2026-11-21", "hardware": "CPU", "versions": {}, "load": 1},
    )


def test_the_interval_over_questions_is_the_normal_one():
    values = np.random.default_rng(0).random((1, 400))
    draws = resampled_means({"colour": values})
    assert abs(draws.std() - values.std() / 400**0.5) < 0.1 * values.std() / 400**0.5
    assert abs(draws.mean() - values.mean()) < 0.002


def test_seeds_widen_the_interval():
    generator = np.random.default_rng(1)
    questions = generator.random((1, 300))
    alike = np.repeat(questions, 4, axis=0)
    apart = np.clip(alike + np.array([-0.3, -0.1, 0.1, 0.3])[:, None], 0, 1)
    assert resampled_means({"list": apart}).std() > 3 * resampled_means({"list": alike}).std()


def test_a_paired_difference_is_known_better_than_either_score():
    points = {p.entrant: p for p in summarize_cells([cell("fused", 4), cell("pool", 4, share=0.45)], "fused")}
    difference, alone = points["pool"].difference, points["pool"].scores["score"]
    assert points["fused"].difference is None
    assert difference.mean == pytest.approx(points["pool"].scores["score"].mean - points["fused"].scores["score"].mean)
    assert difference.high < 0
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)


def test_groups_and_seeds_are_averaged():
    first, second = cell("fused", 4, 0, 0.2), cell("fused", 4, 1, 0.6)
    (point,) = summarize_cells([second, first])
    expected = np.mean([np.mean(one.scores[task]) for one in (first, second) for task in TASKS])
    assert point.scores["score"].mean == pytest.approx(expected)
    assert point.seeds == 2
    assert point.total_flops == 3e6 + 1e6 + 4e5


def test_verdicts_name_who_beats_the_reference():
    cells = [cell("fused", 4, share=0.4), cell("pool", 4, share=0.6), cell("quecc", 4, share=0.39)]
    lines = verdicts(summarize_cells(cells, "fused"), "fused")
    assert lines[0].startswith("m = 4: pool leads")
    assert "last is quecc" in lines[0]
    assert any(line.startswith("fused loses to pool at m = 4") for line in lines)
    assert not any("loses to quecc" in line for line in lines)
    best = [cell("fused", 4, share=0.6), cell("pool", 4, share=0.4)]
    assert verdicts(summarize_cells(best, "fused"), "fused")[-1].startswith("Nobody beats fused")


@lru_cache
def points() -> list[Point]:
    names = ["fused", "fused:fuse_question=false", "quecc", "mine", "dense+random", "dense+visionzip"]
    return summarize_cells([cell(name, m, share=0.1 + m / 20) for name in names for m in (1, 4, 16)], "fused")


def test_every_panel_has_units_and_takes_the_pages_color():
    looks = styles(list(dict.fromkeys(point.entrant for point in points())))
    assert len({(look.color, look.marker, str(look.line), look.filled) for look in looks.values()}) == len(looks)
    for panel in PANELS:
        svg = draw_panel(panel, points(), looks)
        assert panel.xlabel in svg
        assert "score (0 to 1)" in svg
        assert "currentColor" in svg
        assert INK not in svg
        assert "#000000" not in svg
    bare = [Point("given", 4, {"score": Interval(0.5, 0.4, 0.6)})]
    assert [draw_panel(panel, bare, styles(["given"])) is None for panel in PANELS] == [False, *[True] * 6]


def test_ticks_are_few_round_and_inside():
    for low, high in ((0.9, 1.1), (1, 16), (2.1, 3.4), (5, 40000), (7, 7)):
        ticks = nice_ticks(low, high)
        assert 1 <= len(ticks) <= 6
        assert all(low / 1.2 <= tick <= high * 1.2 for tick in ticks)


def test_page_table_record_and_json_have_every_point(tmp_path):
    summary = Summary(points(), "fused", verdicts(points(), "fused"), ["a note"])
    path = write_page(summary, tmp_path, "Title <1>", "lead", ["quecc at m = 2: cannot"])
    assert_fits_a_phone(path, tmp_path)
    page = path.read_text()
    assert "Title &lt;1&gt;" in page
    assert page.count("<svg") == len(PANELS) + 6
    assert "quecc at m = 2: cannot" in page
    assert "http://www.w3.org" in page
    assert "src=" not in page  # self-contained
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert len(document["points"]) == len(points())
    for text in (text_table(summary), markdown_record(summary, "Title")):
        assert all(word in text for word in (*HEADER, "dense+visionzip", "fused:fuse_question=false"))


def save_results(folder, tasks=("colour", "list"), share=0.5):
    folder.mkdir(parents=True, exist_ok=True)
    results = EvaluationResults(describe_environment("test"))
    for m in (4, 8):
        results.scores += [TaskScore(task, m, share, 100, 0.05) for task in tasks]
        results.latencies.append(Latency(m, 0.01 * m, 0.1, 7))
    results.save(folder / "results.json")
    return folder


def test_given_results_are_read_as_they_are(tmp_path):
    found = read_given(save_results(tmp_path / "one"))
    assert [point.num_visual_tokens for point in found] == [4, 8]
    score = found[0].scores["score"]
    assert score.mean == 0.5
    assert score.high - score.mean == pytest.approx(1.96 * 0.05 / 2**0.5)
    assert found[1].latency_ms.mean == pytest.approx(80)
    assert found[0].llm_flops is None
    assert read_given(tmp_path / "one" / "results.json")[0].entrant == "one/results.json"
    with pytest.raises(ValueError, match=r"no results.json"):
        read_given(tmp_path)
    others = read_given(save_results(tmp_path / "two", tasks=("colour",)))
    with pytest.raises(ValueError, match="cannot stand side by side"):
        check_same_tasks([*found, *others])


def test_a_cell_that_is_none_is_named(tmp_path):
    path = tmp_path / "cell.json"
    cell("fused", 4).save(path)
    assert Cell.load(path) == cell("fused", 4)
    for text in (path.read_text()[:-20], "{}", json.dumps({**json.loads(path.read_text()), "scores": {}})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"cell.json .*delete it and run again"):
            Cell.load(path)

"""The common runner and the guard of `benchmarks/`, on clocks and functions of the test's own."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A file of `benchmarks/` as a module; they find each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def by_name(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return by_name


class Clock:
    """Time that passes only where somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def way():
            self.now += seconds

        return way


def test_ways_take_turns_and_the_first_round_is_not_counted(load):
    runner, clock, order = load("runner"), Clock(), []
    ways = {"a": lambda: order.append("a") or clock.work(2)(), "b": lambda: order.append("b") or clock.work(1)()}
    times = runner.take_turns(ways, 3, clock)
    assert order == ["a", "b"] * 4
    assert times == {"a": [2, 2, 2], "b": [1, 1, 1]}
    assert runner.ratio(times["a"], times["b"]).median == 2


def test_a_record_says_what_is_met_and_what_not(load, tmp_path, capsys):
    runner = load("runner")
    record = runner.Record("some", "Some", "A text.")
    record.add("case", {"slow": [0.2, 0.4, 0.6], "fast": [0.1, 0.1, 0.1]}, "slow", {"fast": "a note"})
    assert record.gain("case", "fast") == pytest.approx(4)
    record.goals = [runner.Goal("fast", 3, 4), runner.Goal("small", 1, 2, at_most=True, unmet="it is large")]
    runner.publish(record, tmp_path, 0.5)
    page, document = (tmp_path / "some.md").read_text(), json.loads((tmp_path / "some.json").read_text())
    assert capsys.readouterr().out == page
    assert "| case | fast | 100 (100 to 100) | 4 (2 to 6) | a note |" in page
    assert "| fast | >= 3 | 4 | met |" in page
    assert "| small | <= 1 | 2 | not met: it is large |" in page
    assert [goal["is_met"] for goal in document["goals"]] == [True, False]
    assert {"commit", "cpu", "load", "versions", "date", "command"} <= set(document["environment"])


def test_the_guard_fails_on_what_became_slower_and_on_nothing_else(load, monkeypatch):
    guard, clock = load("guard"), Clock()
    monkeypatch.setattr(guard, "CASES", {"one": (lambda: (clock.work(8), clock.work(1)), clock)})
    assert guard.measure("one", 3).median == 8
    assert guard.measure("one", 3, is_slowed=True).median == 4  # a deliberate slowdown
    recorded = {"one": 8.0}
    assert guard.fallen({"one": 8.0}, recorded) == {}
    assert guard.fallen({"one": 6.0}, recorded) == {}  # a quarter below, just
    assert guard.fallen({"one": 5.9}, recorded) == {"one": "5.9 times as fast, 8 recorded"}
    assert "has no record" in guard.fallen({"other": 1.0}, recorded)["other"]
    assert "was not measured" in guard.fallen({}, recorded)["one"]
    assert guard.fallen({"one": float("nan")}, recorded)


def test_the_guard_ends_with_an_error_on_a_slowdown(load, monkeypatch, tmp_path):
    guard, clock = load("guard"), Clock()
    monkeypatch.setattr(guard, "CASES", {"one": (lambda: (clock.work(8), clock.work(1)), clock)})
    monkeypatch.setattr(guard, "RECORD", tmp_path / "guard.json")
    monkeypatch.setattr(sys, "argv", ["guard.py", "--write"])
    guard.main()
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    guard.main()
    monkeypatch.setattr(sys, "argv", ["guard.py", "--slow", "one"])
    with pytest.raises(SystemExit, match="one: 4 times as fast, 8 recorded"):
        guard.main()
    monkeypatch.setattr(sys, "argv", ["guard.py", "two"])
    with pytest.raises(SystemExit, match="2"):
        guard.main()


def test_what_fell_once_is_measured_again_before_it_fails(load, monkeypatch):
    guard, clock, speeds = load("guard"), Clock(), [2, 1]

    def build():
        return clock.work(8), clock.work(speeds.pop(0))  # the machine was busy the first time

    monkeypatch.setattr(guard, "CASES", {"one": (build, clock)})
    found = guard.look(["one"], 2, [], {"one": 8.0})
    assert found["one"].median == 8
    assert speeds == []


def test_every_guarded_case_has_a_record(load):
    guard = load("guard")
    recorded = json.loads(guard.RECORD.read_text())
    assert set(recorded["gains"]) == set(guard.CASES)
    assert recorded["environment"]["commit"]


def test_running_sums_equal_the_products_of_the_benchmark(load):
    import numpy as np

    divergence = load("divergence")
    a, b = (np.random.default_rng(seed).normal(size=(9, 6)).astype(np.float32) for seed in (0, 1))
    expected = divergence.direct(a.astype(np.float64), b.astype(np.float64))
    for found in (divergence.vectorized(a, b), divergence.pair_curves(a, b)):
        for name, curve in expected.items():
            np.testing.assert_allclose(found[name], curve, atol=1e-6)


def test_the_page_is_what_the_records_say(load):
    writer = load("write_page")
    assert writer.PAGE.read_text() == writer.page()


def test_every_record_names_its_conditions(load):
    load("runner")
    writer = load("write_page")
    for name in writer.ORDER:
        record = json.loads((writer.RESULTS / f"{name}.json").read_text())
        where = record["environment"]
        assert where["commit"] != "unknown"
        assert f"benchmarks/{name}.py" in where["command"]
        assert {"torch", "transformers", "python"} <= set(where["versions"])
        assert all(row["milliseconds"]["rounds"] >= 3 for row in record["rows"])
        assert all(goal["is_met"] or goal["unmet"] for goal in record["goals"]), name

"""Counts agree with torch's counter, rows are complete, the command tells wrong use from right."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.costs.counts import read_shapes
from fusedvlm.costs.profile import Workload, check_counts, profile
from fusedvlm.costs.profiled_model import count_image_views, paper_config, parse_counts
from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector import name_counts


@pytest.mark.parametrize("workload", [Workload(3, 20, 5), Workload(1, 1, 0), Workload(7, 3, 31)])
@pytest.mark.parametrize("m", [1, 7, 12])
def test_counts_agree_with_torch(model, workload, m):
    check_counts(model.config, read_shapes(model.config), m, workload)


def test_a_wrong_count_is_noticed(model):
    shapes = read_shapes(model.config)
    with pytest.raises(ValueError, match="vision at m=7"):
        check_counts(model.config, replace(shapes, vision_linear=shapes.vision_linear + 4000), 7, Workload(3, 20, 5))


def test_the_papers_size_has_the_papers_costs():
    """One 640x480 image: vision 3.8 TFLOP, fusion 1.1 (m = 1) to 1.7 (m = 768), prefill 0.5 to 10.5."""
    config = paper_config()
    assert count_image_views("640x480", config) == 10
    first, last = profile(config, read_shapes(config), [1, 768], Workload())
    assert first.flops["vision"] / 1e12 == pytest.approx(3.8, abs=0.05)
    assert first.flops["fusion"] / 1e12 == pytest.approx(1.1, abs=0.05)
    assert last.flops["fusion"] / 1e12 == pytest.approx(1.7, abs=0.05)
    assert first.flops["prefill"] / 1e12 == pytest.approx(0.5, abs=0.05)
    assert last.flops["prefill"] / 1e12 == pytest.approx(10.5, abs=0.1)
    assert last.kv_cache_bytes == 2 * 32 * 4096 * (768 + 35) * 2


def test_timed_rows(model):
    rows = profile(model.config, read_shapes(model.config), [1, 12], Workload(2, 5, 3), model, repeats=2)
    for row in rows:
        record = row.record()
        timing = row.timing
        assert min(timing.encode, timing.fuse, timing.prefill, timing.decode_token) > 0
        assert record["latency_ms"] == pytest.approx(1e3 * (timing.encode + timing.fuse + timing.prefill))
        assert timing.peak_bytes > 0


def test_command(variant, tmp_path):
    costs = tmp_path / "costs.json"
    result = CliRunner().invoke(
        app, ["profile", "--model", str(variant), "-m", "1,7", "--repeats", "1", "--json", "--output", str(costs)]
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["num_visual_tokens"] for row in document["rows"]] == [1, 7]
    assert json.loads(costs.read_text()) == document["rows"]
    assert set(document["all_counts_seconds"]) == {"one_by_one", "in_one_pass"}
    table = CliRunner().invoke(app, ["profile", "--shapes", "paper", "-m", "1,768"])
    assert table.exit_code == 0
    assert "3.846" in table.stdout
    assert "TTFT" not in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile"], "exactly one of"),
        (["profile", "--shapes", "tiny"], "unknown"),
        (["profile", "--shapes", "paper", "-m", "a,b"], "numbers with commas"),
        (["profile", "--shapes", "paper", "-m", "9999"], "num_visual_tokens=9999 is out of range"),
        (["profile", "--shapes", "paper", "--image-size", "640"], "WIDTHxHEIGHT"),
    ],
)
def test_wrong_use(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_the_m_profiled_by_default_are_those_trained_but_of_a_range_its_doublings():
    def trained(counts):
        return FusedVLMConfig(num_visual_tokens=1, trained_num_visual_tokens=counts)

    assert parse_counts(None, trained([8, 1, 3])) == [1, 3, 8]
    assert parse_counts(None, trained(list(range(1, 13)))) == [1, 2, 4, 8, 12]
    assert parse_counts(None, trained([1, 2])) == [1, 2]
    assert parse_counts("5,7", trained([1, 2])) == [5, 7]


@pytest.mark.parametrize(
    ("counts", "text"),
    [([4, 1, 2, 8], "1, 2, 4, 8"), (range(1, 33), "1 to 32"), ([1, 2, 3, 8, 9, 16, 17, 18], "1 to 3, 8, 9, 16 to 18")],
)
def test_trained_counts_are_named_briefly(counts, text):
    assert name_counts(counts) == text

"""Input effects, clusters and model tables against what they are made of."""

import numpy as np
import pytest

from fusedvlm.scaling import group_curves, read_scores
from fusedvlm.scaling.laws.compare_curves import cluster_curves, input_effects, read_models
from fusedvlm.scaling.score_records import Curve, ScoreRecord


def curve(name, values, m=(1, 2, 4, 8), group=()):
    points = tuple(ScoreRecord(name, "acc", x, y, group) for x, y in zip(m, values, strict=True))
    return Curve(name, "acc", group, points)


def test_effect_of_the_question_in_the_papers_scores():
    curves = group_curves(read_scores("paper"))
    effects = input_effects(curves, "fusion_inputs", "vision+question+queries", "vision+queries (ft)")
    assert len(effects) == 26
    pope = next(e for e in effects if (e.benchmark, e.metric) == ("POPE", "Overall"))
    assert pope.m[0] == 1
    assert pope.per_cent[0] == pytest.approx(100 * (58.113 - 65.648) / 65.648)
    assert pope.mean == pytest.approx(np.mean(pope.per_cent))
    assert [e.mean for e in effects] == sorted((e.mean for e in effects), reverse=True)
    with pytest.raises(ValueError, match="No benchmark has both"):
        input_effects(curves, "fusion_inputs", "a", "b")


def test_clusters_separate_shapes_not_levels():
    rising = [curve(f"up{i}", (10 * i, 11 * i, 12 * i, 13 * i)) for i in (1, 50, 3)]
    falling = [curve(f"down{i}", (4 * i, 3 * i, 2 * i, 1 * i)) for i in (1, 20)]
    flat = [curve("flat", (5, 5, 5, 5))]
    clusters = cluster_curves([*rising, *falling, *flat], clusters=3)
    assert clusters.members(0) == ["up1/acc", "up50/acc", "up3/acc"]
    assert clusters.members(1) == ["down1/acc", "down20/acc"]
    assert clusters.members(2) == ["flat/acc"]
    assert clusters.normalized.min() == 0
    assert clusters.normalized.max() == 1
    np.testing.assert_array_equal(cluster_curves([*rising, *falling, *flat], clusters=3).labels, clusters.labels)


def test_clusters_use_common_m_only():
    clusters = cluster_curves([curve("a", (1, 2, 3, 4)), curve("b", (2, 1, 3), (2, 4, 16))], clusters=1)
    assert clusters.m == (2, 4)
    with pytest.raises(ValueError, match="1 curves with 4 common m; 2 clusters"):
        cluster_curves([curve("a", (1, 2, 3, 4))], clusters=2)


def test_tables_of_models(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("# x\nmodel,benchmark,score\nA,POPE,80\nB,POPE,85\n")
    assert [(s.model, s.score) for s in read_models(path)] == [("A", 80), ("B", 85)]
    path.write_text("model,benchmark,score\nA,POPE,80\nA,POPE,85\n")
    with pytest.raises(ValueError, match="row 3: duplicate of A on POPE"):
        read_models(path)
    path.write_text("model,benchmark,score\nA,POPE,high\n")
    with pytest.raises(ValueError, match="row 2: score is 'high'"):
        read_models(path)

"""Results survive JSON and refuse damage; answers do not depend on batching or caching; summaries are right."""

import numpy as np
import pytest
import torch

from fusedvlm.evaluation import (
    EvaluationResults,
    Latency,
    TaskScore,
    answer_questions,
    describe_environment,
    measure_latencies,
    runner,
    summarize,
)
from fusedvlm.tests import tiny


def test_results_round_trip_and_leave_no_partial_file(tmp_path):
    results = EvaluationResults(
        describe_environment("a command"), [TaskScore("list", 4, 0.25, 8, 0.1)], [Latency(4, 0.1, 0.2, 5)]
    )
    path = tmp_path / "results.json"
    results.save(path)
    assert EvaluationResults.load(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert set(results.environment.versions) == {"python", "torch", "transformers"}


@pytest.mark.parametrize("damage", ["", "{", '{"scores": []}', '{"environment": {}, "scores": [], "latencies": []}'])
def test_damaged_results_are_named(tmp_path, damage):
    path = tmp_path / "results.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"results\.json: not a results file"):
        EvaluationResults.load(path)


def test_a_score_that_is_not_a_number_is_not_written(tmp_path):
    results = EvaluationResults(describe_environment("a"), [TaskScore("list", 4, float("nan"), 8, 0.1)])
    with pytest.raises(ValueError, match="JSON"):
        results.save(tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


def test_summary_is_mean_and_standard_error():
    score = summarize("colour", 8, [1, 0, 0, 1, 1])
    assert score.score == pytest.approx(0.6)
    assert score.standard_error == pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / 5**0.5)
    assert (score.count, score.num_visual_tokens) == (5, 8)
    with pytest.raises(ValueError, match=r"task 'colour' at m=8"):
        summarize("colour", 8, [])


def test_batch_size_and_cached_views_do_not_change_answers(model, processor):
    images = [tiny.picture(seed) for seed in range(5)]
    questions = [f"what is in picture {seed}?" for seed in range(5)]
    single = answer_questions(model, processor, questions, 4, images=images, max_new_tokens=5, batch_size=1)
    counted: list[int] = []
    batched = answer_questions(
        model, processor, questions, 4, images=images, max_new_tokens=5, batch_size=2, on_batch=counted.append
    )
    assert batched == single
    assert counted == [2, 2, 1]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        views = model.model.get_view_features(pixels)[0].unflatten(0, (5, -1))
    assert answer_questions(model, processor, questions, 4, view_features=views, max_new_tokens=5) == single
    with pytest.raises(ValueError, match="exactly one of images and view_features"):
        answer_questions(model, processor, questions, 4)


def test_latencies_are_medians_of_rounds_in_which_all_m_take_turns(model, processor, monkeypatch):
    """On a clock that costs 1 s per visual token and 10 s per new one, and 100 s once."""
    clock, asked = [0.0], []

    def generate(input_ids, max_new_tokens, min_new_tokens, **kwargs):
        m = int((input_ids == model.config.image_token_id).sum())
        asked.append((m, max_new_tokens))
        assert min_new_tokens == max_new_tokens
        clock[0] += m + 10 * max_new_tokens + (100 if len(asked) == 5 else 0)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock[0])
    latencies = measure_latencies(model, processor, tiny.picture(0), "what?", [1, 4], max_new_tokens=3, repeats=3)
    assert asked == [(1, 3), (4, 3)] + 3 * [(1, 1), (1, 3), (4, 1), (4, 3)]
    assert latencies == [Latency(m, m + 10.0, m + 30.0, 3) for m in (1, 4)]


def test_single_questions_are_kept_beside_the_results_and_must_be_theirs(tmp_path):
    path = tmp_path / "results.json"
    scores = {"list": {4: [1.0, 0.0, 0.5], 8: [1.0, 1.0, 0.5]}}
    results = EvaluationResults(
        describe_environment("a command"), [summarize("list", m, values) for m, values in scores["list"].items()]
    )
    results.question_scores = scores
    results.save(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "results.questions.json"]
    assert "question_scores" not in path.read_text()
    assert EvaluationResults.load(path) == results
    beside = tmp_path / "results.questions.json"
    beside.write_text(beside.read_text().replace("0.0", "1.0"))
    with pytest.raises(ValueError, match=r"results.questions.json: list at m=4 does not give the mean"):
        EvaluationResults.load(path)
    EvaluationResults(results.environment, results.scores).save(path)  # results without them: no others' remain
    assert EvaluationResults.load(path).question_scores == {}

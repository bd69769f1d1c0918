"""A variant at every m in one pass: the same answers as one at a time, pictures encoded once, nothing asked twice."""

import json

import pytest
import torch

from fusedvlm.evaluation import EvaluationResults, answer_questions
from fusedvlm.evaluation.answers.answer_files import read_answers
from fusedvlm.evaluation.answers.answer_run import AnswerRun, Share, read_journal
from fusedvlm.evaluation.answers.evaluate_tasks import Asking, evaluate_tasks
from fusedvlm.evaluation.answers.variant_answers import VariantAnswers
from fusedvlm.evaluation.task_options import build_tasks
from fusedvlm.evaluation.tasks.task import Task
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.tests.evaluation.toys import choice_rows, short_rows, write_tsv, yes_no_rows

COUNTS = [7, 1, 12]


class Loaded:
    """A variant as `VisualChat` has it."""

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model, processor


@pytest.fixture
def tasks(tmp_path):
    files = [write_tsv(tmp_path / "choice.tsv", choice_rows(5)), write_tsv(tmp_path / "short.tsv", short_rows(3, 1))]
    return build_tasks([str(path) for path in files], tmp_path, max_new_tokens=6)


@pytest.fixture
def answerer(model, processor):
    return VariantAnswers(Loaded(model, processor), batch_size=3)


def run_of(task, folder, answerer, counts=COUNTS, **options):
    run = AnswerRun(task, "weights", counts, folder, **options)
    run.ask(answerer)
    return run.answers(answerer.settings, counts)


def test_all_m_at_once_answer_as_one_at_a_time(tasks, answerer, model, processor, tmp_path):
    for task in tasks:
        assert isinstance(task, Task)
        found = run_of(task, tmp_path / "journals", answerer)
        for m in COUNTS:
            expected = [
                answer_questions(
                    model,
                    processor,
                    [task.prompt(record)],
                    m,
                    images=[load_image(record.images[0].read())],
                    max_new_tokens=6,
                )[0]
                for record in task.records()
            ]
            assert [found[record.index][m] for record in task.records()] == expected
    assert len({text for by_m in found.values() for text in by_m.values()}) > 1


def test_every_picture_goes_through_the_tower_once(tasks, answerer, tmp_path):
    for task in tasks:
        run_of(task, tmp_path, answerer)
    pictures = {image.digest for task in tasks for record in task.records() for image in record.images}
    assert answerer.views.encoded == len(pictures)


def test_view_tokens_on_the_disk_are_in_sixteen_bits_and_change_nothing_from_run_to_run(
    tasks, model, processor, tmp_path
):
    first = VariantAnswers(Loaded(model, processor), tmp_path / "views")
    second = VariantAnswers(Loaded(model, processor), tmp_path / "views")
    found = run_of(tasks[0], tmp_path / "one", first)
    assert found == run_of(tasks[0], tmp_path / "two", second)
    assert (first.views.encoded, second.views.encoded) == (4, 0)
    assert first.settings["views"] == "float16"
    kept = next(iter(first.views.kept.values()))
    assert kept.dtype == torch.float16
    path = next((tmp_path / "views").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        run_of(tasks[0], tmp_path / "three", VariantAnswers(Loaded(model, processor), tmp_path / "views"))


def test_little_memory_forgets_the_oldest_picture(tasks, model, processor):
    answerer = VariantAnswers(Loaded(model, processor))
    answerer.views.memory = 1
    images = [record.images[0] for record in tasks[0].records()[:2]]
    answerer.views.get(images)
    assert len(answerer.views.kept) == 1
    answerer.views.get(images[:1])
    assert answerer.views.encoded == 3


def test_rows_that_memory_does_not_hold_are_decoded_in_halves(tasks, answerer, tmp_path, monkeypatch):
    expected = run_of(tasks[0], tmp_path / "one", answerer)
    decode, sizes = answerer._decode, []

    def crowded(rows, *about):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("no room")
        return decode(rows, *about)

    monkeypatch.setattr(answerer, "_decode", crowded)
    assert run_of(tasks[0], tmp_path / "two", answerer) == expected
    assert max(sizes) > 1
    monkeypatch.setattr(answerer, "_decode", lambda rows, *about: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        run_of(tasks[0], tmp_path / "three", answerer)


def test_what_was_answered_is_not_asked_again(tasks, answerer, tmp_path):
    expected = run_of(tasks[0], tmp_path / "whole", answerer)
    run_of(tasks[0], tmp_path / "parts", answerer, [1])
    asked = []

    class Counting:
        batch_size, settings = 2, answerer.settings

        def answer(self, batch, counts):
            asked.extend((entry.prompt, m) for entry in batch for m in counts)
            return answerer.answer(batch, counts)

    (journal,) = (tmp_path / "parts").glob("*.jsonl")
    with open(journal, "ab") as file:
        file.write(b'{"key": "cut sh')
    found = run_of(tasks[0], tmp_path / "parts", Counting())
    assert found == expected
    assert len(asked) == 10
    assert {m for _, m in asked} == {7, 12}
    asked.clear()
    run_of(tasks[0], tmp_path / "parts", Counting())
    assert asked == []


def test_other_weights_prompts_or_caps_find_no_old_answer(tasks, tmp_path):
    run, record = AnswerRun(tasks[0], "weights", COUNTS, tmp_path), tasks[0].records()[0]
    keys = {run.key(record, 1, {}), run.key(record, 7, {}), run.key(record, 1, {"dtype": "bfloat16"})}
    keys.add(AnswerRun(tasks[0], "others", COUNTS, tmp_path).key(record, 1, {}))
    tasks[0].bare_question = True
    keys.add(AnswerRun(tasks[0], "weights", COUNTS, tmp_path).key(record, 1, {}))
    tasks[0].max_new_tokens = 9
    keys.add(AnswerRun(tasks[0], "weights", COUNTS, tmp_path).key(record, 1, {}))
    assert len(keys) == 6


def test_processes_ask_their_part_and_the_first_one_scores_all(tasks, answerer, tmp_path):
    asking = [Asking(answerer, "tiny", "weights", tuple(COUNTS))]
    alone = evaluate_tasks(tasks, asking, tmp_path / "alone", "test")
    shares = [Share(rank, 3) for rank in (1, 2, 0)]
    found = [evaluate_tasks(tasks, asking, tmp_path / "many", "test", share) for share in shares]
    assert found[:2] == [None, None]
    assert found[2].results.scores == alone.results.scores
    assert len(list((tmp_path / "many" / "evaluation").glob("*.0-of-3.journal.jsonl"))) == 2
    # Later with one process: everything is known.
    again = evaluate_tasks(tasks, asking, tmp_path / "many", "test")
    assert again.results.scores == alone.results.scores


def test_missing_answers_are_no_score(tasks, answerer, tmp_path):
    asking = [Asking(answerer, "tiny", "weights", tuple(COUNTS))]
    with pytest.raises(RuntimeError, match="choice: 9 of 15 answers are missing; run the same command again"):
        evaluate_tasks(tasks, asking, tmp_path, "test", Share(0, 3))


class Silent:
    """Answers nothing at m = 1."""

    batch_size = 8
    settings: dict = {}

    def answer(self, batch, counts):
        return [{m: "" if m == 1 else "A" for m in counts} for _ in batch]


def test_silence_at_an_m_is_an_error_and_not_a_zero(tasks, tmp_path):
    evaluation = evaluate_tasks(tasks, [Asking(Silent(), "tiny", "weights", (1, 7))], tmp_path, "test")
    assert [problem[:38] for problem in evaluation.problems] == [
        "choice: all 5 answers at m=1 are empty", "short: all 3 answers at m=1 are empty.",
    ]  # fmt: skip
    assert evaluation.results.scores == []


def test_records_say_where_a_score_is_from(tmp_path):
    path = write_tsv(tmp_path / "yes.tsv", yes_no_rows(4))

    class Says(Silent):
        settings = {"dtype": "float32"}

        def answer(self, batch, counts):
            return [{m: ["Yes", "perhaps"][n % 2] for m in counts} for n, _ in enumerate(batch)]

    tasks = build_tasks([str(path)], tmp_path, limit=3)
    evaluation = evaluate_tasks(tasks, [Asking(Says(), "owner/name", "c0ffee", (1, 8))], tmp_path, "a command")
    first, second = evaluation.results.scores
    assert (first.label, first.metric, first.scale, first.count, first.unparsed) == (
        "yes yes_no (first 3)",
        "yes_no",
        "0..1",
        3,
        1,
    )
    assert first.standard_error == pytest.approx((2 / 3 * 1 / 3 / 2) ** 0.5)
    assert second.num_visual_tokens == 8
    source = evaluation.results.sources[first.source]
    assert (source.harness, source.judge, source.model, source.model_commit) == (
        "local",
        "exact_matching",
        "owner/name",
        "c0ffee",
    )
    assert source.data_file == "yes.tsv"
    assert len(source.data_sha256) == 64
    assert source.settings["question"] == "whole prompt"
    rows = list(read_answers(tmp_path / source.answers_file))
    assert [row["parsed"] for row in rows[:3]] == ["Yes", None, "Yes"]
    assert evaluation.unread == {"yes": ["'perhaps' to 'is 1 red?' at m=1", "'perhaps' to 'is 1 red?' at m=8"]}
    evaluation.results.save(tmp_path / "results.json")
    assert EvaluationResults.load(tmp_path / "results.json") == evaluation.results
    document = json.loads((tmp_path / "results.json").read_text())
    assert "is_primary" not in document["scores"][0]  # what is at its default is left out


def test_newer_scores_replace_those_of_the_same_name_alone(tmp_path):
    path = write_tsv(tmp_path / "yes.tsv", yes_no_rows(4))

    class Says(Silent):
        text = "Yes"

        def answer(self, batch, counts):
            return [dict.fromkeys(counts, self.text) for _ in batch]

    def results(text, counts, command):
        says = Says()
        says.text, says.settings = text, {"says": text}
        return evaluate_tasks(
            build_tasks([str(path)], tmp_path), [Asking(says, "n", "w", counts)], tmp_path, command
        ).results

    old, new = results("Yes", (1, 4), "old"), results("No", (4, 8), "new")
    joined = old.joined(new)
    assert [(row.num_visual_tokens, joined.sources[row.source].environment.command) for row in joined.scores] == [
        (1, "old"), (4, "new"), (8, "new"),
    ]  # fmt: skip
    assert set(joined.sources) == {row.source for row in joined.scores}


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "a.journal.jsonl"
    path.write_text('{"answer": 1}\n{"key": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.journal\.jsonl, line 1"):
        list(read_journal(path))

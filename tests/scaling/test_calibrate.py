"""`num_visual_tokens="auto"`: fitted, measured on held-out questions, put into a variant, and what a question then gets."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.processing import FusedVLMProcessor
from fusedvlm.processing.processing_fusedvlm_auto import QuestionCalibration, words_of
from fusedvlm.scaling.tradeoff.calibrate import (
    AskedQuestion,
    calibrate,
    fit_calibration,
    install,
    measure_saving,
    read_asked_questions,
)
from fusedvlm.serving import VisualChat
from fusedvlm.serving.cli import read_count
from fusedvlm.tests import tiny


def questions(count: int = 300, noise: float = 0.1) -> list[AskedQuestion]:
    """Look-up questions that one token answers, dense ones that gain with every doubling."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        is_dense = number % 3 == 0
        text = "List all objects!" if is_dense else f"Which colour is at b{generator.integers(1, 5)}?"
        scores = {m: 0.1 * np.log2(2 * m) if is_dense else 0.9 for m in (1, 2, 4)}
        rows.append(AskedQuestion(text, {m: float(s + noise * generator.normal()) for m, s in scores.items()}))
    return rows


def test_a_question_gets_the_smallest_m_that_should_lose_no_more_than_the_tolerance():
    record = fit_calibration(questions(noise=0.0), tolerance=0.02)
    calibration = QuestionCalibration(json.loads(json.dumps(record)))
    assert calibration.choose("which COLOUR is at b2") == 1
    assert calibration.choose("List all objects") == 4
    assert calibration.choose("Colour of the third objects from all the list?") == 4  # half of its words are not known
    assert calibration.choose("Wie spät ist es?") == calibration.choose("") == 4
    generous = QuestionCalibration({**record, "tolerance": 0.15})
    assert generous.choose("List all objects") == 2
    # The rule by hand, for one question.
    words = [record["words"][word] for word in words_of("List all objects")]
    expected = np.array(record["bias"]) + np.sum(words, axis=0)
    assert expected == pytest.approx([0.1, 0.2, 0.3], abs=0.02)


def test_the_saving_is_that_of_questions_it_was_not_fitted_to():
    rows = questions()
    record, saving = calibrate(rows, tolerance=0.05)
    assert saving.questions == 150
    assert saving.is_worth_it
    assert saving.saved == pytest.approx(1 - (2 / 3 * 1 + 1 / 3 * 4) / 4, abs=0.1)
    order = np.random.default_rng(0).permutation(300)
    assert (
        measure_saving(fit_calibration([rows[i] for i in order[:150]], 0.05), [rows[i] for i in order[150:]]) == saving
    )
    assert record["held_out"]["loss"] == saving.loss
    flat = [AskedQuestion(f"{'colour' if n % 2 else 'all'} {n}", {1: n % 2, 4: 1.0}) for n in range(40)]
    assert not calibrate(flat, tolerance=2.0)[1].is_worth_it  # saves all, and loses half of the answers


def test_the_command_writes_only_what_is_worth_it(tmp_path, variant):
    folder = tmp_path / "variant"
    shutil.copytree(variant, folder)
    table = tmp_path / "asked.jsonl"

    def write(rows):
        table.write_text(
            "".join(json.dumps({"question": r.question, "scores": r.scores, "task": "x"}) + "\n" for r in rows)
        )

    write(questions())
    assert read_asked_questions(table) == questions()
    options = ["--variant", str(folder), "--output", str(tmp_path / "c.json"), "--tolerance", "0.05"]
    result = CliRunner().invoke(app, ["scaling", "calibrate", str(table), *options])
    assert result.exit_code == 0, result.exception
    assert "saves " in result.stdout
    record = json.loads((tmp_path / "c.json").read_text())
    assert json.loads((folder / "processor_config.json").read_text())["auto_num_visual_tokens"] == record
    # Where every question needs all tokens there is nothing to save.
    write([AskedQuestion(f"all {n % 5}", {1: 0.0, 4: 1.0}) for n in range(40)])
    (tmp_path / "c.json").unlink()
    result = CliRunner().invoke(app, ["scaling", "calibrate", str(table), *options])
    assert result.exit_code == 1
    assert "Not worth it, so nothing was written" in result.stderr
    assert not (tmp_path / "c.json").exists()
    result = CliRunner().invoke(app, ["scaling", "calibrate", str(table), *options, "--force", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["is_worth_it"] is False
    assert (tmp_path / "c.json").exists()


def test_a_calibrated_variant_chooses_by_the_first_question_and_survives_saving(tmp_path, variant):
    folder = tmp_path / "variant"
    shutil.copytree(variant, folder)
    install(fit_calibration(questions(noise=0.0)), folder)
    processor = FusedVLMProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "again")
    processor = FusedVLMProcessor.from_pretrained(tmp_path / "again")

    def encode(texts, m):
        conversations = [[tiny.user(tiny.picture(0), text=text)] for text in texts]
        kwargs = {"padding": True, "num_visual_tokens": m}
        return processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            processor_kwargs=kwargs,
        )  # fmt: skip

    texts = ["which colour is at b1", "list all objects"]
    assert encode(texts, "auto")["num_visual_tokens"].tolist() == [1, 4]
    assert encode(texts, ["auto", 2])["num_visual_tokens"].tolist() == [1, 2]
    explicit = encode(texts, [1, 4])
    assert all((encode(texts, "auto")[name] == explicit[name]).all() for name in explicit)
    # A later question does not change the image's tokens.
    turns = [
        tiny.user(tiny.picture(0), text=texts[0]), tiny.assistant("red"), tiny.user(text=texts[1]),
    ]  # fmt: skip
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    (plan,) = processor.plan_prompts([text], num_visual_tokens="auto")
    assert plan.segments[0].num_visual_tokens == 1
    with pytest.raises(ValueError, match="'many' is not a whole number"):
        encode(texts, "many")

    chat = VisualChat(folder, device="cpu")
    assert chat.served("auto", texts[1]) == 4
    for text in texts:
        m = chat.served("auto", text)
        assert chat.ask(tiny.picture(1), text, "auto", max_new_tokens=4) == chat.ask(
            tiny.picture(1), text, m, max_new_tokens=4
        )


def test_auto_without_a_calibration_or_with_a_damaged_one_is_refused_in_one_line(processor, tmp_path, variant):
    with pytest.raises(ValueError, match="needs a calibration, and this variant has none"):
        processor.choose_num_visual_tokens("what?")
    record = fit_calibration(questions(noise=0.0))
    for damage in (
        {"counts": [4, 1, 2]},
        {"bias": [1.0]},
        {"words": {"a": ["b"]}},
        {"words": 3},
        {"tolerance": float("nan")},
    ):
        with pytest.raises(ValueError, match="alibration of num_visual_tokens='auto'") as caught:
            QuestionCalibration({**record, **damage})
        assert len(str(caught.value)) <= 300
    with pytest.raises(ValueError, match="KeyError"):
        QuestionCalibration({})
    with pytest.raises(ValueError, match="takes up to"):
        install({**record, "counts": [1, 2, 10_000]}, variant)
    with pytest.raises(ValueError, match="is no variant"):
        install(record, tmp_path)
    shutil.copytree(variant, tmp_path / "old")
    (tmp_path / "old" / "processing_fusedvlm_auto.py").unlink()
    with pytest.raises(ValueError, match="brings older code"):
        install(record, tmp_path / "old")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", 'line 21: needs "question"'),
        ('{"question": "a", "scores": {"1": "x", "4": 1}}', "line 21: scores .* are not numbers"),
        ('{"question": "a", "scores": {"0": 1, "4": 1}}', "line 21: scores .* from 1 on"),
        ('{"question": "a", "scores": {"1": 1, "8": 1}}', r"line 21: scored at m = \[1, 8\], others at \[1, 4\]"),
        ("{", "line 21: damaged"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "asked.jsonl"
    good = '{"question": "a", "scores": {"1": 1, "4": 1}}\n'
    path.write_text(good * 20 + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_asked_questions(path)
    path.write_text(good * 3)
    with pytest.raises(ValueError, match="3 questions at 2 m; a calibration needs 20"):
        read_asked_questions(path)


def test_m_is_typed_as_a_number_or_auto():
    assert (read_count(None), read_count("auto"), read_count("8")) == (None, "auto", 8)
    with pytest.raises(ValueError, match="-m 'many'"):
        read_count("many")

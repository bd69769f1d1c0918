"""Rows that cannot be trained on: the same verdict in collators and in `data check`, and what is left of long ones."""

import json

import pytest
from typer.testing import CliRunner

from fusedvlm.data.cli import app
from fusedvlm.data.prepare.row_check import RowChecker, RowLimits, RowReport, UntrainableRow
from fusedvlm.data.records import normalize_sample
from fusedvlm.tests import tiny
from fusedvlm.trainers import ConversationCollator
from fusedvlm.trainers.collators import IGNORED, decode_ids


def row(question="what?", answer="a cat", image=True, more=(), **kwargs) -> dict:
    images = [tiny.picture(1)] if image else []
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for text, reply in more:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    return {"id": "data.jsonl, row 7", "source": "chat", "images": images, "messages": messages, **kwargs}


UNTRAINABLE = {
    "empty question": row(question=" "),
    "empty answer": row(answer=""),
    "no answer": {"id": "x", "images": [], "messages": [{"role": "user", "content": "hello"}]},
    "malformed conversation": row(images=[tiny.picture(1)] * 2, messages=[{"role": "user", "content": [{"type": "image"}]}]),
    "image cannot be used": row(images=["nowhere.png"]),
    "too long": row(question="x " * 50_000),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNTRAINABLE)
def test_every_reason_by_its_name(reason, processor):
    with pytest.raises(UntrainableRow) as caught:
        RowChecker(processor).check(UNTRAINABLE[reason])
    assert caught.value.reason == reason


@pytest.mark.parametrize("reason", UNTRAINABLE)
@pytest.mark.parametrize("with_answers", [False, True])
def test_one_such_row_leaves_the_others_of_its_batch_as_they_are(reason, with_answers, processor):
    good = [row(), row("where?", "there")]
    bad = {**UNTRAINABLE[reason], "id": "the bad one"}
    make = ConversationCollator(processor, with_ids=True, with_answers=with_answers, skip_untrainable=True)
    batch, expected = make([good[0], bad, good[1]]), make(good)
    [entry] = map(json.loads, decode_ids(batch.pop("skipped_rows")))
    assert (entry["id"], entry["reason"]) == ("the bad one", reason)
    assert batch.keys() == expected.keys()
    assert all(batch[name].equal(expected[name]) for name in batch)


@pytest.mark.parametrize("reason", UNTRAINABLE)
def test_without_skipping_the_row_is_named_by_its_id_not_by_its_place(reason, processor):
    bad = {**UNTRAINABLE[reason], "id": "data.jsonl, row 7"}
    with pytest.raises(ValueError, match=r"^Data\.jsonl, row 7: ") as caught:
        ConversationCollator(processor)([row(), bad])
    assert len(str(caught.value)) <= 300
    assert "Sample 0" not in str(caught.value)


def test_a_batch_of_which_nothing_is_left_teaches_nothing(processor, model):
    make = ConversationCollator(processor, with_ids=True, with_answers=True, skip_untrainable=True)
    batch = make([row(answer=""), row(question="")])
    assert (batch["labels"] == IGNORED).all()
    assert "pixel_values" not in batch
    assert len(batch["answer_input_ids"]) == 0
    assert len(decode_ids(batch["skipped_rows"])) == 2


def lengths(processor, sample) -> tuple[int, list[int]]:
    checker = RowChecker(processor)
    return checker.encode(normalize_sample(sample)["messages"])


def test_a_long_answer_is_cut_and_its_end_is_not_learned(processor):
    sample = row(answer="word " * 40)
    whole, starts = lengths(processor, sample)
    limit = starts[0] + 10
    batch = ConversationCollator(processor, max_length=limit, overlong="truncate")([row(), sample])
    untouched = ConversationCollator(processor)([row(), sample])
    assert batch["input_ids"].shape[1] == limit < whole
    assert batch["labels"][1].equal(untouched["labels"][1, :limit])
    assert (batch["labels"][1] != IGNORED).sum() == 10
    assert processor.tokenizer.eos_token_id not in batch["labels"][1].tolist()
    assert processor.tokenizer.eos_token_id in batch["labels"][0].tolist()


def test_turns_that_do_not_fit_go_with_their_visual_tokens_and_images(processor):
    late = [{"type": "image"}, {"type": "text", "text": "and here?"}]
    sample = row(more=[(late, "yes")], images=[tiny.picture(1), tiny.picture(2)])
    sample["messages"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "what?"}]
    whole, starts = lengths(processor, sample)
    assert len(starts) == 2
    for limit in (starts[1] + 1, starts[1], starts[0] + 3, starts[0] + 1):
        batch = ConversationCollator(processor, max_length=limit, overlong="truncate")([sample])
        kept = 2 if limit > starts[1] else 1
        assert len(batch["image_num_views"]) == kept
        placeholders = (batch["input_ids"] == processor.image_token_id).sum()
        assert placeholders == batch["num_visual_tokens"].sum()
        assert batch["input_ids"].shape[1] <= limit < whole
        assert (batch["labels"] != IGNORED).any()


def test_a_row_whose_cutting_leaves_no_answer_is_skipped(processor):
    _, starts = lengths(processor, row())
    make = ConversationCollator(
        processor, max_length=starts[0], overlong="truncate", skip_untrainable=True, with_ids=True
    )
    [entry] = map(json.loads, decode_ids(make([row()])["skipped_rows"]))
    assert entry["reason"] == "too long, and cutting leaves no answer"


def test_the_model_reads_a_cut_batch(processor, model):
    _, starts = lengths(processor, row(answer="word " * 40))
    batch = ConversationCollator(processor, max_length=starts[0] + 5, overlong="truncate")([row(answer="word " * 40)])
    assert model(**batch).loss.isfinite()


def test_a_limit_above_what_the_model_reads_does_not_raise_that(processor):
    limits = RowLimits(max_length=10**6)
    assert limits.tokens(processor) == processor.tokenizer.model_max_length
    with pytest.raises(ValueError, match="max_length=0 must be"):
        RowLimits(max_length=0)
    with pytest.raises(ValueError, match="must be drop or truncate"):
        RowLimits(overlong="cut")


def test_lengths_in_doubling_bins_and_quantiles(processor):
    report = RowReport()
    for count in (1, 1, 2, 40, 200):
        report.add(RowChecker(None), row(question="w " * count, answer="x"))
    report.add(RowChecker(None), row(answer=""))
    assert report.histogram() == [
        {"from": 0, "to": 16, "rows": 3}, {"from": 32, "to": 64, "rows": 1}, {"from": 128, "to": 256, "rows": 1},
    ]  # fmt: skip
    assert (report.quantile(0.5), report.quantile(1)) == (3, 201)
    assert report.reasons == {"empty answer": 1}


def test_images_of_a_column_are_what_they_hold(processor, tmp_path):
    """`{"path": ...}` is no file name, and neither is a number."""
    tiny.picture(1).save(tmp_path / "a.png")
    make = ConversationCollator(processor)
    expected = make([row(images=[str(tmp_path / "a.png")])])
    for image in ({"path": str(tmp_path / "a.png"), "bytes": None}, {"bytes": (tmp_path / "a.png").read_bytes()}):
        assert make([row(images=[image])])["pixel_values"].equal(expected["pixel_values"])
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        make([row(images=[{"file": "a.png"}])])


@pytest.fixture
def mixed(tmp_path):
    """A file with one good, one long and one empty-handed row."""
    tiny.picture(1).save(tmp_path / "a.png")
    rows = [{**row(), "images": ["a.png"]}, {**row(question="x " * 300), "images": ["a.png"]}]
    rows.append({"id": "odd", "images": ["a.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "yes"}]})  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**one, "id": f"{number}"}) + "\n" for number, one in enumerate(rows)))
    return path


def test_data_check_counts_by_reason_shows_lengths_and_ends_with_code_2(mixed, processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    words = ["check", str(mixed), "--type", "chat", "--processor", str(tmp_path / "processor"), "--max-length", "300"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert isinstance(result.exception, ValueError)
    assert "2 of 3 rows cannot be trained on (1 empty question, 1 too long)" in str(result.exception)
    rows = json.loads(result.stdout)["rows"]
    assert rows["untrainable"] == {"empty question": 1, "too long": 1}
    assert rows["unit"] == "tokens"
    assert [entry["rows"] for entry in rows["histogram"]] == [1]
    dropped = CliRunner().invoke(app, [*words, "--drop", str(tmp_path / "good.jsonl")], catch_exceptions=False)
    assert dropped.exit_code == 0
    assert "rows by length in tokens" in dropped.stdout
    assert len((tmp_path / "good.jsonl").read_text().splitlines()) == 1
    cut = CliRunner().invoke(app, [*words[:-1], "900", "--overlong", "truncate", "--json"])
    assert json.loads(cut.stdout)["rows"]["untrainable"] == {"empty question": 1}


def test_data_check_without_a_processor_looks_at_what_needs_no_tokens(mixed):
    result = CliRunner().invoke(app, ["check", str(mixed), "--type", "chat", "--json"])
    assert json.loads(result.stdout)["rows"]["untrainable"] == {"empty question": 1}
    assert json.loads(result.stdout)["rows"]["unit"] == "words"

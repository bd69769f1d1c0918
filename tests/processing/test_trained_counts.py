"""Counts that were trained and counts that were not: served with one warning, or rounded down on request."""

import copy
import json

import pytest
from transformers import AutoProcessor
from transformers.utils import logging
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.evaluation import answer_questions
from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.processing import exactly_as_asked
from fusedvlm.processing.processing_fusedvlm_counts import VisualTokenCounts
from fusedvlm.serving.chat import know_trained_counts
from fusedvlm.tests import tiny
from fusedvlm.trainers import ConversationCollator


@pytest.fixture(autouse=True)
def warnings_are_shown():
    """Commands that ran before in this process may have set the verbosity."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def listed(processor):
    """Trained with 1, 7 and 12; m' is 3."""
    found = copy.copy(processor)
    found._has_warned = False
    # Trainings of this session, which note in the processor what they train, may have had the same one.
    found.trained_num_visual_tokens, found.trained_num_visual_tokens_is_range = [1, 7, 12], False
    return found


@pytest.fixture
def ranged(listed):
    """The same, trained with every m from 2 to 12."""
    listed.trained_num_visual_tokens, listed.trained_num_visual_tokens_is_range = [2, 4, 8, 12], True
    return listed


def counts(processor, m=None, followup=None, turns=1, **kwargs):
    conversation = [tiny.user(tiny.picture(0), text="what is in the image?")]
    for _ in range(turns - 1):
        conversation += [tiny.assistant("a red cat"), tiny.user(text="how many?")]
    batch = processor.apply_chat_template(
        [conversation],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"num_visual_tokens": m, "num_followup_visual_tokens": followup, **kwargs},
    )
    placeholders = sum(token == processor.image_token_id for token in batch["input_ids"][0])
    assert placeholders == sum(batch["num_visual_tokens"])
    return list(batch["num_visual_tokens"])


def test_an_untrained_count_is_served_and_told_once(listed, caplog):
    assert counts(listed, 7) == [7]
    assert counts(listed, 12, turns=2) == [12, 3]
    assert not caplog.records
    assert counts(listed, 6) == [6]
    assert counts(listed, 5) == [5]
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "num_visual_tokens=6" in text
    assert "1, 7, 12 only" in text
    assert "round_down" in text


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (6, 1), (7, 7), (11, 7), (12, 12)])
def test_a_count_is_rounded_down_on_request(listed, caplog, asked, given):
    assert counts(listed, asked, num_visual_tokens_policy="round_down") == [given]
    listed.num_visual_tokens_policy = "round_down"
    assert counts(listed, asked) == [given]
    assert counts(listed, asked, num_visual_tokens_policy="as_asked") == [asked]
    assert len(caplog.records) == (asked != given)


def test_followups_are_rounded_down_too_and_their_own_count_counts_as_trained(listed):
    listed.num_visual_tokens_policy = "round_down"
    assert counts(listed, 12, turns=2) == [12, 3]
    assert counts(listed, 12, 3, turns=2) == [12, 3]
    assert counts(listed, 12, 6, turns=2) == [12, 3]
    assert counts(listed, 12, 2, turns=2) == [12, 1]
    assert counts(listed, 6, turns=2) == [1, 1]
    assert counts(listed, 6, 5, turns=2) == [1, 1]


def test_later_questions_of_connectors_that_are_not_nested_follow_m_down(listed):
    rules = {"name": "grid", "counts": [1, 4, 9], "smallest": 1, "per_view": False, "reads_question": True}
    listed.connector = {**rules, "question_tokens": "own", "nested": False}
    listed.trained_num_visual_tokens, listed.num_visual_tokens_policy = [1, 9], "round_down"
    assert counts(listed, 4, turns=2) == [1, 1]
    assert counts(listed, 4, 4, turns=2) == [1, 1]
    assert counts(listed, 9, 9, turns=2) == [9, 9]


def test_lists_of_counts_are_rounded_one_by_one(listed):
    messages = [[tiny.user(tiny.picture(seed), text="what?")] for seed in range(3)]
    batch = listed.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"num_visual_tokens": [6, 7, 12], "num_visual_tokens_policy": "round_down", "padding": True},
    )
    assert list(batch["num_visual_tokens"]) == [1, 7, 12]


def test_every_count_of_a_range_is_trained(ranged, caplog):
    ranged.num_visual_tokens_policy = "round_down"
    for m in range(2, 13):
        assert counts(ranged, m) == [m]
    assert not caplog.records
    with pytest.raises(ValueError, match=r"num_visual_tokens=1 is below every m .* the smallest is 2"):
        counts(ranged, 1)
    assert counts(ranged, 1, num_visual_tokens_policy="as_asked") == [1]
    assert "m = 2 to 12 only" in caplog.text


def test_servers_count_what_is_served(listed):
    listed.num_visual_tokens = 6
    views = {"image_num_views": [3]}
    assert listed.replace_image_token(views, 0).count("<image>") == 6
    assert listed._get_num_multimodal_tokens([(40, 60)])["num_image_tokens"] == [6]
    listed.num_visual_tokens_policy = "round_down"
    assert listed.replace_image_token(views, 0).count("<image>") == 1
    assert listed._get_num_multimodal_tokens([(40, 60)])["num_image_tokens"] == [1]


def test_what_is_not_known_is_not_judged(listed, caplog):
    listed.trained_num_visual_tokens = None
    listed.num_visual_tokens_policy = "round_down"
    assert counts(listed, 6) == [6]
    assert not caplog.records
    know_trained_counts(listed, FusedVLMConfig(num_visual_tokens=7, trained_num_visual_tokens=[1, 7, 12]))
    assert counts(listed, 6) == [1]
    assert VisualTokenCounts(None, 12).is_trained(5)


def test_who_trains_or_measures_at_m_means_m(model, listed):
    listed.num_visual_tokens_policy = "round_down"
    row = {"images": [tiny.picture(0)], "messages": [{"role": "user", "content": "what?"}]}
    row["messages"].append({"role": "assistant", "content": "a cat"})
    assert ConversationCollator(listed, num_visual_tokens=6)([row])["num_visual_tokens"].tolist() == [6]
    asked = []
    listed.batch_decode = lambda tokens, **kwargs: asked.append(tokens.shape) or [""]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            type(model),
            "generate",
            lambda self, num_visual_tokens, input_ids, **kwargs: asked.append(num_visual_tokens.tolist()) or input_ids,
        )
        answer_questions(model, listed, ["what?"], 6, images=[tiny.picture(0)])
    assert asked[0] == [6]
    assert exactly_as_asked(object()) == {}


def test_describe_says_which_m_was_served(variant, tmp_path):
    tiny.picture(0).save(tmp_path / "picture.png")
    shown = []
    for more in ([], ["--round-down"]):
        command = ["describe", str(tmp_path / "picture.png"), "--model", str(variant), "-m", "6", "--json", *more]
        result = CliRunner().invoke(app, [*command, "--max-new-tokens", "2"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        shown.append(json.loads(result.stdout)["answers"][0]["num_visual_tokens"])
    assert shown == [6, 1]


def test_policies_that_do_not_exist_are_refused(listed):
    with pytest.raises(ValueError, match="num_visual_tokens_policy='up' must be as_asked or round_down"):
        counts(listed, 6, num_visual_tokens_policy="up")


def test_a_saved_processor_knows_what_was_trained(ranged, tmp_path):
    ranged.num_visual_tokens_policy = "round_down"
    ranged.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["trained_num_visual_tokens"] == [2, 4, 8, 12]
    assert "_has_warned" not in written
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.trained_num_visual_tokens_is_range is True
    assert counts(again, 5) == [5]
    assert again.num_visual_tokens_policy == "round_down"


def test_new_configurations_say_how_m_was_trained(model, variant):
    assert model.config.trained_num_visual_tokens_is_range is False
    assert json.loads((variant / "config.json").read_text())["trained_num_visual_tokens_is_range"] is False
    assert FusedVLMConfig().trained_num_visual_tokens_is_range is None  # a file older than the field

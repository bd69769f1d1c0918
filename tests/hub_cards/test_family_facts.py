"""What the repositories of a family share, and the example in their cards."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedvlm.hub_cards.check.repository_check import check_files
from fusedvlm.hub_cards.release.variant_release import build_family
from fusedvlm.tests import tiny


@pytest.fixture
def family(tiny_family, tmp_path):
    shutil.copytree(tiny_family, tmp_path / "family")
    return tmp_path / "family"


def add_example(folder, **changes):
    tiny.picture(3).save(folder / "example.png")
    answers = {"1": "nothing", "7": "a | red *circle*", "12": "a red circle"}
    document = {"image": "example.png", "question": "What is it?", "expected": "a red circle", "answers": answers}
    (folder / "example.json").write_text(json.dumps({**document, **changes}))


def card_of(release) -> str:
    return release.files["README.md"].decode()


def test_a_family_says_that_its_repositories_hold_the_same_weights(family):
    releases = build_family(family, "ada", license="mit")
    digest = releases[0].facts.counted.sha256["model.safetensors"]
    assert [release.facts.common.weights for release in releases] == [digest] * 3
    assert f"All 3 repositories of this family hold the same weights (sha256 `{digest}`)" in card_of(releases[0])
    assert check_files(releases[0].files) == []


def test_a_family_of_different_weights_does_not_and_has_no_dial(family):
    path = family / "tiny-m7" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.projector.weight"] += torch.ones(())
    save_file(tensors, path, {"format": "pt"})
    releases = build_family(family, "ada", license="mit")
    assert all(release.facts.common.weights is None for release in releases)
    assert "hold the same weights" not in card_of(releases[0])
    with pytest.raises(ValueError, match=r"hold the same weights.*these 3 do not"):
        build_family(family, "ada", license="mit", dial=True)


def test_the_dial_s_repository_is_sound(family):
    dial, *others = build_family(family, "ada", license="mit", dial=True)
    assert dial.repo_id == "ada/tiny"
    assert dial.num_visual_tokens == tiny.MAX_M
    assert "This one is for those who turn the dial." in card_of(dial)
    assert check_files(dial.files, "ada/tiny") == []
    assert len(others) == 3


def test_weights_that_a_family_does_not_share_are_noticed(family):
    release = build_family(family, "ada", license="mit")[0]
    facts = json.loads(release.files["facts.json"])
    facts["common"]["weights"] = "0" * 64
    problems = check_files({**release.files, "facts.json": json.dumps(facts).encode()})
    assert any(problem.file == "facts.json" for problem in problems)


def test_a_card_shows_a_picture_with_real_answers_at_two_m(family):
    add_example(family)
    first, middle, last = build_family(family, "ada", license="mit")
    assert "| answer at m = 1 | nothing |\n| answer at m = 12 | a red circle |" in card_of(first)
    assert "| answer at m = 1 | nothing |\n| answer at m = 7 | a &#124; red &#42;circle&#42; |" in card_of(middle)
    assert "| answer at m = 12 | a red circle |" in card_of(last)
    assert "![The picture that the question below is about](example.png)" in card_of(middle)
    assert check_files(middle.files) == []
    other = {**middle.files, "example.png": middle.files["plots/score_vs_m.png"]}
    assert any(problem.file == "example.png" for problem in check_files(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": {"1": "x"}}, "answers at 1 numbers of visual tokens"),
        ({"answers": ["x"]}, "not an example"),
        ({"image": "gone.png"}, "missing or no PNG"),
        ({"answers": {"one": "x", "2": "y"}}, "not an example"),
    ],
)
def test_a_damaged_example_is_told(family, changes, message):
    add_example(family, **changes)
    with pytest.raises(ValueError, match=message):
        build_family(family, "ada", license="mit")


def test_without_an_example_the_card_has_none(family):
    assert "example.png" not in card_of(build_family(family, "ada", license="mit")[0])


def test_four_bits_are_shown_where_there_is_something_to_save(tiny_release):
    from dataclasses import replace

    from fusedvlm.hub_cards.card.lint_card import lint_card
    from fusedvlm.hub_cards.card.render_card import render_card

    facts = tiny_release.facts
    assert "load_in_4bit" not in render_card(facts)
    groups = {
        group: 7_000_000_000 if "language" in group else count for group, count in facts.counted.parameters.items()
    }
    large = replace(facts, counted=replace(facts.counted, parameters=groups))
    card = render_card(large)
    assert "load_in_4bit=True" in card
    sizes = dict.fromkeys(tiny_release.files, 1)
    assert lint_card(card, sizes, facts.repo_id) == []


def test_equal_weights_are_equal_files(model, tmp_path):
    """safetensors writes its metadata in a random order, so one saving in two would differ."""
    model.config.text_model_name_or_path, before = None, model.config.text_model_name_or_path
    try:
        for number in range(6):
            model.save_pretrained(tmp_path / str(number), merged=True)
    finally:
        model.config.text_model_name_or_path = before
    assert len({(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(6)}) == 1

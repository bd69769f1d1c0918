"""The `card` command, and the example in the documentation."""

import json
import shlex
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.hub_cards.card.lint_card import FENCE, lint_card
from fusedvlm.hub_cards.card.readback import differences, read_back
from fusedvlm.hub_cards.card.render_card import render_card
from fusedvlm.hub_cards.check.repository_check import check_folder
from fusedvlm.hub_cards.facts import CardFacts, read_stated
from fusedvlm.hub_cards.licenses import license_texts
from fusedvlm.hub_cards.release.release_files import card_files, evidence_files
from fusedvlm.hub_cards.release.run_facts import content_hash
from fusedvlm.tests.hub_cards.tiny_family import write_family

EXAMPLE = Path(__file__).parents[2] / "docs" / "example_card"


@pytest.fixture(scope="module")
def example():
    return CardFacts.from_json((EXAMPLE / "facts.json").read_text(encoding="utf-8"))


def test_the_example_is_what_its_facts_render(example):
    assert (EXAMPLE / "README.md").read_text(encoding="utf-8") == render_card(example)
    assert (EXAMPLE / "facts.json").read_text(encoding="utf-8") == example.to_json()


def test_everything_beside_the_example_follows_from_its_facts(example):
    stated = read_stated(EXAMPLE / "facts.yaml")
    files = {**evidence_files(example), **card_files(example), **license_texts(stated, example.counted)}
    here = {path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*") if path.is_file()}
    assert here == {*files, "facts.yaml", "checksums.json", "example.png"}
    assert content_hash(EXAMPLE / "example.png") == example.example.sha256
    for name, content in files.items():
        if name.endswith(".png"):
            again, committed = Image.open(BytesIO(content)), Image.open(EXAMPLE / name)
            assert again.size == committed.size, name
        else:
            assert (EXAMPLE / name).read_bytes() == content, name
    hashes = json.loads((EXAMPLE / "checksums.json").read_text())["files"]
    for name in files:
        assert hashes[name] == content_hash(EXAMPLE / name), name


def test_the_example_is_of_a_real_run_and_breaks_no_rule(example):
    assert example.measured.environment.command.startswith("fusedvlm quickstart")
    assert [neighbor.num_visual_tokens for neighbor in example.family] == [1, 2, 4, 8, 16, 32]
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    sizes = {path.relative_to(EXAMPLE).as_posix(): path.stat().st_size for path in EXAMPLE.rglob("*")}
    assert lint_card(text, sizes, example.repo_id) == []
    assert differences(text, example) == []


def run(*arguments):
    return CliRunner().invoke(app, ["card", *map(str, arguments)])


def test_a_draft_without_a_license_says_so(tmp_path):
    folder = write_family(tmp_path / "family") / "tiny-m7"
    config = (folder / "config.json").read_bytes()
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert "no license is stated" in result.stderr
    assert read_back((folder / "README.md").read_text()).glance["License"].startswith("—")
    assert (folder / "plots" / "score_vs_m.png").exists()
    assert (folder / "config.json").read_bytes() == config
    problems = check_folder(folder, load=False)
    assert {problem.file for problem in problems} >= {"checksums.json", "LICENSE-CODE"}


def test_a_variant_over_a_local_language_model_gets_a_draft_only(variant, tmp_path):
    folder = tmp_path / "v"
    shutil.copytree(variant, folder)
    assert run(folder).exit_code == 0
    card = (folder / "README.md").read_text()
    assert "loads only where\nit was made" in card
    assert str(tmp_path) not in card
    result = run(folder, "--license", "mit")
    assert "nobody else has" in str(result.exception)


def test_a_license_makes_the_folder_a_repository(tmp_path):
    family = write_family(tmp_path / "family")
    (family / "facts.yaml").write_text("license: mit\nlimitations: many\n")
    result = run(family / "tiny-m7", "--namespace", "ada")
    assert result.exit_code == 0, result.output
    assert check_folder(family / "tiny-m7", load=False) == []
    before = {path: path.read_bytes() for path in (family / "tiny-m7").rglob("*") if path.is_file()}
    assert run(family / "tiny-m7", "--namespace", "ada").exit_code == 0
    assert before == {path: path.read_bytes() for path in (family / "tiny-m7").rglob("*") if path.is_file()}


def test_a_family_goes_to_a_folder_each(tmp_path, tiny_family):
    result = run(tiny_family, "--license", "mit", "--output", tmp_path / "out", "--name", "toy", "--tag", "v2")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["toy-m1", "toy-m12", "toy-m7"]
    for folder in (tmp_path / "out").iterdir():
        assert check_folder(folder, load=False) == []
        assert 'revision = "your-name/' in (folder / "README.md").read_text()
        assert yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["license"] == "mit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "apache"], "did you mean apache-2.0"),
        (["--license", "other"], "license_name"),
        (["--output", "out"], "No license is stated"),
        (["--license", "mit", "--license-file", "nowhere.txt"], "no such license file"),
        (["--facts", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--license", "mit", "--namespace", "a b"], "cannot be a repository"),
    ],
)
def test_wrong_use_is_one_line(tiny_family, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tiny_family.rglob("*"))
    result = run(tiny_family / "tiny-m7", *options)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1
    assert sorted(tiny_family.rglob("*")) == before  # nothing was written


def test_somebody_s_own_card_is_not_replaced(tmp_path):
    folder = write_family(tmp_path / "family") / "tiny-m7"
    (folder / "README.md").write_text("mine")
    result = run(folder, "--license", "mit")
    assert "was not written by this command" in str(result.exception)
    assert (folder / "README.md").read_text() == "mine"


def test_text_of_a_person_reaches_the_card(tmp_path, tiny_family):
    (tmp_path / "facts.yaml").write_text(
        "license: other\nlicense_name: my terms\nlicense_link: https://example.org/terms\nlanguages: [en]\n"
        "datasets: [{name: Mine, id: ada/mine, license: cc-by-4.0}]\nlimitations: |\n  Some.\n\n  Others.\n"
        f"citation: '@misc{{x}}'\ncollection: ada/tiny-every-m-{'0123456789ab' * 2}\n"
    )
    result = run(tiny_family / "tiny-m7", "--facts", tmp_path / "facts.yaml", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["license_name"], metadata["datasets"], metadata["language"]) == ("my terms", ["ada/mine"], ["en"])
    assert "[my terms](https://example.org/terms)" in card
    assert "Others." in card
    assert "```bibtex\n@misc{x}\n```" in card
    assert f"(https://huggingface.co/collections/ada/tiny-every-m-{'0123456789ab' * 2})" in card


@pytest.mark.parametrize(
    "slug", ["ada", "https://huggingface.co/collections/ada/x", "ada/x-0123", "ada/x) [y](z-" + "0" * 24]
)
def test_a_collection_is_linked_only_when_it_is_one(tmp_path, tiny_family, slug):
    (tmp_path / "facts.yaml").write_text(f"license: mit\ncollection: {json.dumps(slug)}\n")
    result = run(tiny_family / "tiny-m7", "--facts", tmp_path / "facts.yaml", "--output", tmp_path / "out")
    assert "must be OWNER/TITLE-ID" in str(result.exception)
    assert run(tiny_family / "tiny-m7", "--license", "mit", "--output", tmp_path / "none").exit_code == 0
    assert "huggingface.co/collections" not in (tmp_path / "none" / "README.md").read_text()


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    """docs/cards.md from top to bottom: `fusedvlm` commands in this process (imports take seconds), the rest by bash."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path / "runs" / "quickstart", counts=(1, 8), name="fusedvlm")
    page = (EXAMPLE.parent / "cards.md").read_text(encoding="utf-8")
    blocks = [source for _, language, source in FENCE.findall(page) if language == "bash"]
    outputs = {}
    for block in blocks:
        if "<<" in block:
            subprocess.run(["bash", "-ec", block], check=True)
            continue
        for line in block.splitlines():
            if not line.startswith("fusedvlm "):
                subprocess.run(["bash", "-ec", line], check=True)
                continue
            command, _, failure = line.partition(" || ")
            result = CliRunner().invoke(app, shlex.split(command)[1:])
            assert result.exit_code == (1 if failure else 0), (line, result.output, result.exception)
            outputs[line] = result.output
    sound, loaded, problem = (text for line, text in outputs.items() if " check " in line)
    assert sound.count(": sound, ") == 2
    assert "loads and answers without this package" in loaded
    assert "notes.txt: not listed in checksums.json" in problem
    assert (tmp_path / "runs" / "space" / "app.py").exists()
    assert "The weights: apache-2.0" in (tmp_path / "runs" / "published" / "fusedvlm-m8" / "README.md").read_text()

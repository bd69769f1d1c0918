"""`fusedvlm push` as a user runs it: options, exit codes, output."""

import json
import re
import sys

import pytest
from huggingface_hub import constants

from fusedvlm.tests import tiny
from fusedvlm.tests.hub_cards.faulty_hub import Fault

pytestmark = pytest.mark.usefixtures("online")
LICENSES = ("--license", "apache-2.0", "--llm-license", "apache-2.0")
COUNTS = (4, 12)


@pytest.fixture(scope="module")
def family(backbones, tmp_path_factory):
    """A folder with two self-contained variants."""
    folder = tmp_path_factory.mktemp("family")
    model = tiny.build_model(backbones)
    processor = tiny.build_tiny_processor(model)
    model.config.text_model_name_or_path = None
    for m in COUNTS:
        model.config.num_visual_tokens = processor.num_visual_tokens = m
        model.save_pretrained(folder / f"tiny-m{m}", merged=True)
        processor.save_pretrained(folder / f"tiny-m{m}")
    return folder


@pytest.fixture
def push(hub_server, user, monkeypatch, capsys):
    """Run the command against the test Hub; returns (exit code, standard output, standard error)."""
    from fusedvlm import cli

    # What HF_ENDPOINT sets, had it been there when huggingface_hub was imported.
    template = hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", user)

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fusedvlm", "push", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = done.code or 0
        out, err = capsys.readouterr()
        assert user not in out + err
        return code, out, err

    return run


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_a_family_from_dry_run_to_public(push, family, hub_server):
    code, out, _ = push(family, "--all", "--namespace", "ada", *LICENSES, "--dry-run")
    assert code == 0
    assert "ada/tiny-m4 (m = 4, tag v1.0): " in out
    assert re.search(r"^  \+ model.safetensors  [\d.]+ kB$", out, re.MULTILINE)
    assert "Collection: tiny, every m" in out
    assert last_line(out).startswith("2 repositories, ")
    assert last_line(out).endswith("nothing was sent.")
    assert hub_server.store.repos == {}

    code, out, _ = push(family, "--all", "--namespace", "ada", *LICENSES)
    assert code == 0
    assert (
        len(re.findall(r"^\S+/ada/tiny-m\d+  m = \d+, private, v1.0 at [0-9a-f]{8}: \d+ added$", out, re.MULTILINE))
        == 2
    )
    (collection,) = hub_server.store.collections.values()
    assert [(item["id"], item["note"]["text"]) for item in collection["items"]] == [
        ("ada/tiny-m4", "m = 4"),
        ("ada/tiny-m12", "m = 12"),
    ]
    assert collection["private"]

    code, out, _ = push(family, "--all", "--namespace", "ada", *LICENSES, "--dry-run")
    assert out.count("up to date, 0 B to send") == 2
    code, out, _ = push(family, "--all", "--namespace", "ada", *LICENSES, "--public", "--json")
    assert code == 0
    document = json.loads(out)
    assert [row["private"] for row in document["repositories"]] == [False, False]
    assert [row["num_visual_tokens"] for row in document["repositories"]] == [4, 12]
    assert [row["sent_bytes"] for row in document["repositories"]] == [0, 0]
    for row in document["repositories"]:
        assert row["commit"] == hub_server.store.repos[row["repo_id"]].tags["v1.0"]
    assert document["collection"].startswith(hub_server.endpoint)
    assert not collection["private"]
    neighbors = hub_server.store.repos["ada/tiny-m4"].head.files["README.md"].data.decode()
    assert "ada/tiny-m12" in neighbors, "cards link their neighbors"


def test_one_variant_to_a_named_repository(push, family, hub_server):
    code, out, _ = push(family / "tiny-m4", "--repo", "lab/mine", *LICENSES, "--tag", "v2.0")
    assert code == 0
    assert "lab/mine  m = 4, private, v2.0 at" in out
    assert set(hub_server.store.repos) == {"lab/mine"}
    assert hub_server.store.collections == {}
    tagged = hub_server.store.repos["lab/mine"].tags["v2.0"]
    code, _, err = push(family / "tiny-m4", "--repo", "lab/mine", "--license", "mit", "--tag", "v2.0")
    assert code == 2, "the user has to decide"
    assert re.match(f"fusedvlm: lab/mine: tag v2.0 is at commit {tagged}.*never moved.*--tag v2.1", last_line(err))
    code, out, _ = push(family / "tiny-m4", "--repo", "lab/mine", *LICENSES, "--tag", "v2.1", "--dry-run")
    assert "  ~ README.md" in out
    assert "  = " in out
    assert "  + " not in out


def test_a_title_of_ones_own_and_none(push, family, hub_server):
    assert push(family, "--all", "--namespace", "ada", *LICENSES, "--no-collection")[0] == 0
    assert hub_server.store.collections == {}
    assert push(family, "--all", "--namespace", "ada", *LICENSES, "--collection", "My dial")[0] == 0
    assert [collection["title"] for collection in hub_server.store.collections.values()] == ["My dial"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--all", "--namespace", "ada"], "No license is stated"),
        (["--namespace", "ada", *LICENSES], "holds 2 variants; give --all"),
        (["--all", *LICENSES], "exactly one of --namespace USER and --repo"),
        (["--all", "--namespace", "ada", "--repo", "ada/x", *LICENSES], "exactly one of --namespace USER and --repo"),
        (["--all", "--repo", "ada/x", *LICENSES], "--repo names one repository"),
        (["--all", "--namespace", "ada", "--create-pr", "--public", *LICENSES], "--create-pr only proposes"),
        (["--all", "--namespace", "bob", *LICENSES], "bob/tiny-m4: the token belongs to ada"),
        (["--all", "--namespace", "ada", *LICENSES, "--collection", "x" * 61], "title has 61 characters"),
        (["--all", "--namespace", "ada", *LICENSES, "--tag", "a b"], "cannot be a tag"),
        (["--all", "--namespace", "ada", *LICENSES, "--license", "nonsense"], "nonsense"),
        (["--all", "--namespace", "ada", "--adapters", *LICENSES], "neither an adapter"),
        (["--repo", "ada/x", "--adapters", *LICENSES], "give --namespace"),
    ],
)
def test_wrong_use_is_one_line_and_two(push, family, hub_server, options, line):
    code, out, err = push(family, *options)
    assert code == 2
    assert out == ""
    assert line in last_line(err)
    assert hub_server.store.repos == {}


def test_a_folder_that_is_not_there(push, tmp_path):
    code, _, err = push(tmp_path / "none", "--namespace", "ada")
    assert code == 2
    assert "none" in last_line(err)


def test_a_variant_that_fails_the_check_is_not_sent(push, family, hub_server, tmp_path):
    import shutil

    shutil.copytree(family / "tiny-m4", tmp_path / "tiny-m4")
    weights = tmp_path / "tiny-m4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = push(tmp_path / "tiny-m4", "--repo", "ada/tiny", *LICENSES)
    assert code == 2
    assert "model.safetensors" in last_line(err)
    assert hub_server.calls == []


def test_trouble_at_the_hub_is_one_line_and_one(push, family, hub_server):
    hub_server.fault = Fault(1, "status", 403, times=99, matching=lambda method, path: "/commit/" in path)
    code, out, err = push(family, "--all", "--namespace", "ada", *LICENSES)
    assert code == 1
    assert out == ""
    assert last_line(err).startswith("fusedvlm: ada/tiny-m4: the token may not do this: Injected")
    hub_server.fault = None
    assert push(family, "--all", "--namespace", "ada", *LICENSES)[0] == 0


def test_a_dry_run_without_the_network_says_so(push, family, hub_server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = push(family, "--all", "--namespace", "ada", *LICENSES, "--dry-run")
    assert code == 0
    assert "Could not compare with the Hub: ada/tiny-m4: offline mode is on" in err
    assert "ada/tiny-m4 (m = 4, tag v1.0): not compared, " in out
    assert re.search(r"^  \? model.safetensors  [\d.]+ kB$", out, re.MULTILINE)
    code, out, _ = push(family, "--all", "--namespace", "ada", *LICENSES, "--dry-run", "--json")
    document = json.loads(out)
    assert document["compared"] is False
    assert document["repositories"][0]["difference"] is None
    assert document["repositories"][0]["sent_bytes"] > 1000
    assert hub_server.calls == []


def test_a_proposal(push, family, hub_server):
    hub_server.store.create("bob/tiny", private=False, author="bob")
    options = family / "tiny-m4", "--repo", "bob/tiny", *LICENSES, "--create-pr"
    code, out, _ = push(*options)
    assert code == 0
    assert "bob/tiny/discussions/1  m = 4, proposed" in out
    assert push(*options)[1].count("discussions/1") == 1
    repo = hub_server.store.repos["bob/tiny"]
    assert repo.head.title == "initial commit"
    card = repo.commits[repo.branches["refs/pr/1"]].files["README.md"].data.decode()
    assert 'revision = "bob/tiny", "main"' in card, "nobody else can set the tag that a release's card would pin"
    assert push(*options, "--tag", "v1.0")[0] == 2


def test_one_repository_with_the_dial_beside_one_per_m(push, family, hub_server):
    code, _, err = push(family, "--all", "--namespace", "ada", *LICENSES, "--dial", "--public")
    assert code == 0, err
    assert set(hub_server.store.repos) == {"ada/tiny", "ada/tiny-m4", "ada/tiny-m12"}
    (collection,) = hub_server.store.collections.values()
    assert [(item["id"], item["note"]["text"]) for item in collection["items"]] == [
        ("ada/tiny", "Every m from 1 to 12, by the dial"),
        ("ada/tiny-m4", "m = 4"),
        ("ada/tiny-m12", "m = 12"),
    ]
    cards = {name: repo.head.files["README.md"].data.decode() for name, repo in hub_server.store.repos.items()}
    assert "# tiny, every m\n" in cards["ada/tiny"]
    assert all("hold the same weights" in card for card in cards.values())
    assert "[ada/tiny](https://huggingface.co/ada/tiny)" in cards["ada/tiny-m4"]
    assert "huggingface.co/collections" not in cards["ada/tiny-m4"]  # nobody stated where the family's is


def test_facts_come_from_the_file_that_is_given(push, family, hub_server, tmp_path):
    facts = tmp_path / "said.yaml"
    facts.write_text("license: mit\nllm_license: mit\nintended_use: For the test of the page.\n")
    assert push(family / "tiny-m4", "--repo", "ada/tiny", "--facts", facts)[0] == 0
    card = hub_server.store.repos["ada/tiny"].head.files["README.md"].data.decode()
    assert "license: mit" in card
    assert "For the test of the page." in card


def test_adapters_and_their_base(push, family, hub_server, tmp_path):
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
    from fusedvlm.trainers.lora import add_lora

    for m in COUNTS:
        base = FusedVLMForConditionalGeneration.from_pretrained(family / "tiny-m12")
        add_lora(base, "fusion", rank=2).save_pretrained(tmp_path / f"low-m{m}")
    code, out, err = push(tmp_path, "--adapters", "--namespace", "ada", *LICENSES)
    assert (code, out) == (2, "")
    assert "holds 2 adapters; give --all" in last_line(err)
    code, out, _ = push(tmp_path, "--adapters", "--all", "--namespace", "ada", *LICENSES, "--dry-run")
    assert code == 0
    assert last_line(out).startswith("3 repositories")
    assert hub_server.store.repos == {}
    code, out, err = push(tmp_path, "--adapters", "--all", "--namespace", "ada", *LICENSES, "--public", "--json")
    assert code == 0, err
    names = ["ada/low-base", "ada/low-m4-lora", "ada/low-m12-lora"]
    assert [row["repo_id"] for row in json.loads(out)["repositories"]] == names
    (collection,) = hub_server.store.collections.values()
    assert [item["id"] for item in collection["items"]] == names
    assert collection["title"] == "low-lora, every m"
    assert not collection["private"]

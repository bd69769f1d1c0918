"""Adapters on one pushed base: what is pushed, refused, and loaded back where this package is not installed."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedvlm.hub_cards.check.check_all import verify
from fusedvlm.hub_cards.check.repository_check import check_folder
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.push.push_adapters import plan_adapters, push_adapters
from fusedvlm.hub_cards.release.adapter_release import build_adapters
from fusedvlm.hub_cards.release.release_files import checksums as make_checksums
from fusedvlm.hub_cards.release.variant_release import write_file
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests import tiny
from fusedvlm.tests.hub_cards.synthetic import content_of
from fusedvlm.tests.hub_cards.test_loading import ask_here, run_elsewhere
from fusedvlm.trainers.lora import add_lora

pytestmark = pytest.mark.usefixtures("online")
LICENSES = {"license": "apache-2.0", "llm_license": "apache-2.0"}
COUNTS = (4, 12)


@pytest.fixture(scope="module")
def trained(backbones, tmp_path_factory):
    """A folder with base/ and fam/tiny-m4, fam/tiny-m12, and the adapted models by m."""
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny.build_model(backbones)
    processor = tiny.build_tiny_processor(model)
    model.config.text_model_name_or_path = None
    model.save_pretrained(folder / "base", merged=True)
    processor.save_pretrained(folder / "base")
    models = {}
    for m in COUNTS:
        adapted = add_lora(FusedVLMForConditionalGeneration.from_pretrained(folder / "base"), "fusion", rank=2)
        generator = torch.Generator().manual_seed(m)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.3, generator=generator)
        processor.num_visual_tokens = m
        adapted.save_pretrained(folder / "fam" / f"tiny-m{m}")
        processor.save_pretrained(folder / "fam" / f"tiny-m{m}")
        models[m] = adapted.eval()
    return folder, models, processor


@pytest.fixture
def folder(trained, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(trained[0], tmp_path / "copy")
    for path in (tmp_path / "copy" / "fam").glob("*/adapter_config.json"):
        edit(path, base_model_name_or_path=str(tmp_path / "copy" / "base"))
    return tmp_path / "copy"


@pytest.fixture
def hub(hub_server, user):
    return Hub(hub_server.endpoint, user, RetryPolicy(attempts=2, first_wait=0.0))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def build(folder, **options):
    return build_adapters(folder, "ada", **{"name": None, "tag": "v1.0", "stated": None, **LICENSES, **options})


# argv: repository of the adapter, repository of the base, revision, m, picture, output
ELSEWHERE = """
import sys
sys.modules["fusedvlm"] = None
import torch
from peft import AutoPeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
repo, base, revision, m, picture, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(base, revision=revision, trust_remote_code=True)
processor.num_visual_tokens = int(m)
content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "what is in the image?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
logits = {}
with torch.no_grad():
    model = AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
    logits["transformers"] = model(**inputs).logits
    logits["peft"] = AutoPeftModel.from_pretrained(repo, trust_remote_code=True).eval()(**inputs).logits
    base = AutoModelForImageTextToText.from_pretrained(base, revision=revision, trust_remote_code=True).eval()
    logits["base"] = base(**inputs).logits
torch.save(logits, output)
"""


@pytest.mark.parametrize("transfer", ["lfs"], indirect=True)
def test_adapters_are_pushed_pinned_and_loaded_elsewhere(trained, hub, hub_server, transfer, tmp_path):
    folder, models, processor = trained
    family = build(folder / "fam")
    rows = push_adapters(family, hub, public=True)
    assert [row.repo_id for row in rows] == ["ada/tiny-base", "ada/tiny-m4-lora", "ada/tiny-m12-lora"]
    assert not any(row.private for row in rows)
    for row in rows[1:]:
        files = hub_server.store.repos[row.repo_id].head.files
        config = json.loads(files["adapter_config.json"].data)
        assert (config["base_model_name_or_path"], config["revision"]) == ("ada/tiny-base", rows[0].commit)
        assert str(folder) not in files["adapter_config.json"].data.decode()
        assert set(files) == {
            ".gitattributes", "LICENSE", "LICENSE-CODE", "README.md", "adapter_config.json",
            "adapter_model.safetensors", "checksums.json",
        }  # fmt: skip
    before = {repo.id: len(repo.commits) for repo in hub_server.store.repos.values()}
    again = push_adapters(build(folder / "fam"), hub, public=True)
    assert not any(row.difference for row in again)
    assert {repo.id: len(repo.commits) for repo in hub_server.store.repos.values()} == before

    # The base moves on; the pinned adapter must not notice.
    base = hub_server.store.repos["ada/tiny-base"]
    base.commit("main", "another base", "", "ada", {p: b for p, b in base.head.files.items() if p == ".gitattributes"})
    hub_server.mode = transfer
    tiny.picture(3).save(tmp_path / "picture.png")
    run = run_elsewhere(
        hub_server, tmp_path / "home", "ada/tiny-m4-lora", "ada/tiny-base", "v1.0", 4, tmp_path / "picture.png",
        tmp_path / "out.pt", script=ELSEWHERE,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    loaded = torch.load(tmp_path / "out.pt")
    processor.num_visual_tokens = 4
    expected = ask_here(models[4], processor)[0]
    torch.testing.assert_close(loaded["transformers"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded["peft"], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loaded["base"], expected, atol=1e-2)


def test_the_card_says_what_the_adapter_is(trained):
    family = build(trained[0] / "fam")
    (release, _) = family.releases("1" * 40)
    card = content_of(release.files["README.md"]).decode()
    weights = load_file(trained[0] / "fam" / "tiny-m4" / "adapter_model.safetensors")
    assert f"| Parameters | {sum(tensor.numel() for tensor in weights.values()):,} |" in card
    assert "| Rank, alpha | 2, 32 |" in card
    assert "| Adapted layers | 14 in fuser |" in card
    assert "1" * 40 in card
    assert "| **4** | [ada/tiny-m4-lora]" in card
    assert "| 12 | [ada/tiny-m12-lora]" in card
    assert card.count("not measured") == 2
    assert "missing, not zero" in card


@pytest.fixture
def published(trained, tmp_path):
    """An adapter's repository as it is pushed, in a folder."""
    release = build(trained[0] / "fam").releases("a" * 40)[0]
    for name, content in release.files.items():
        write_file(tmp_path / "repo" / name, content)
    return tmp_path / "repo"


def test_check_knows_adapters(published):
    report = verify(str(published))[0]
    assert report.problems == []
    assert not report.loaded
    assert check_folder(published, "ada/tiny-m4-lora") == []


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_config.json", lambda p: edit(p, revision="main"), "refers to its base at 'main'"),
        ("adapter_config.json", lambda p: edit(p, base_model_name_or_path="mine"), "not a repository"),
        ("adapter_config.json", lambda p: p.unlink(), "missing"),
        ("adapter_model.safetensors", lambda p: p.unlink(), "missing"),
        ("adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9]), "damaged weights"),
        ("adapter_model.safetensors", lambda p: save_file({"a": torch.ones(2)}, p), "has no LoRA weights"),
        ("README.md", lambda p: p.write_text(p.read_text().replace("a" * 40, "b" * 40)), "does not name its base's"),
        ("LICENSE", lambda p: p.write_bytes(pickle.dumps([1])), "pickle"),
    ],
)
def test_check_finds_what_is_wrong_with_an_adapter(published, name, damage, message):
    damage(published / name)
    if (checksums := published / "checksums.json").exists():  # as if whoever damaged it had signed it
        files = {path.name: path for path in published.iterdir() if path != checksums}
        write_file(checksums, make_checksums(files))
    assert any(message in str(problem) for problem in check_folder(published)), check_folder(published)


def test_a_dry_run_sends_nothing(trained, hub, hub_server):
    rows, reason = plan_adapters(build(trained[0] / "fam"), hub)
    assert reason is None
    assert [len(row.difference.add) > 0 for row in rows] == [True] * 3
    assert {method for method, _, _ in hub_server.calls} == {"GET"}


def test_adapters_of_another_base_are_refused(folder):
    shutil.copytree(folder / "base", folder / "other")
    edit(folder / "fam" / "tiny-m12" / "adapter_config.json", base_model_name_or_path=str(folder / "other"))
    with pytest.raises(ValueError, match="belong to 2 bases"):
        build(folder / "fam")


def test_a_base_that_is_not_here_is_refused(folder):
    for m in COUNTS:
        edit(folder / "fam" / f"tiny-m{m}" / "adapter_config.json", base_model_name_or_path="ada/elsewhere")
    with pytest.raises(ValueError, match="belong to ada/elsewhere, which is no folder here"):
        build(folder / "fam")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"{", "adapter_config.json: damaged, not JSON"),
        ("adapter_config.json", b'{"peft_type": "IA3"}', "does not describe a LoRA adapter"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("adapter_model.safetensors", b"\0" * 40, "damaged weights"),
        ("processor_config.json", b"{", "damaged, not JSON"),
    ],
)
def test_damaged_adapters_are_refused(folder, name, content, message):
    path = folder / "fam" / "tiny-m4" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(folder / "fam")


def test_weights_without_lora_are_refused(folder):
    save_file({"x": torch.zeros(2)}, folder / "fam" / "tiny-m4" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has no LoRA weights"):
        build(folder / "fam")


def test_two_adapters_of_one_m_are_refused(folder):
    shutil.copytree(folder / "fam" / "tiny-m4", folder / "fam" / "tiny-m5")
    with pytest.raises(ValueError, match="both have m=4"):
        build(folder / "fam")


def test_m_comes_from_the_name_when_no_processor_is_there(folder):
    for m in COUNTS:
        (folder / "fam" / f"tiny-m{m}" / "processor_config.json").unlink()
    assert list(build(folder / "fam").folders) == list(COUNTS)
    (folder / "fam" / "tiny-m4").rename(folder / "fam" / "mine")
    with pytest.raises(ValueError, match="does not say its number of visual tokens"):
        build(folder / "fam")


def test_a_folder_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither an adapter"):
        build(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        build(tmp_path / "none")


def test_no_license_no_push(trained):
    with pytest.raises(ValueError, match="No license is stated"):
        build(trained[0] / "fam", license=None)

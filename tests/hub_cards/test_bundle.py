"""A variant's own files as they are published."""

import json
from pathlib import Path

import pytest

from fusedvlm.hub_cards.release.bundle import auto_maps, bundle, check_code, is_local, self_contained
from fusedvlm.hub_cards.release.run_facts import read_content
from fusedvlm.hub_code import code_files
from fusedvlm.tests.hub_cards.tiny_family import COMMIT, save_variant

ROOT = Path(__file__).parents[2]


def test_everything_a_variant_needs_travels(tiny_release):
    names = set(tiny_release.files)
    assert {path.name for path in code_files()} <= names
    assert {
        "README.md", "LICENSE-CODE", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "query_tokenizer/tokenizer.json",
        "query_tokenizer/tokenizer_config.json", "plots/score_vs_m.png", "plots/latency_vs_m.png", "training/config.json",
        "training/data.json", "results.json", "swapped.json", "facts.json", "checksums.json",
    } <= names  # fmt: skip
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    manifest = json.loads(tiny_release.files["training/data.json"])
    assert len(manifest["missing"]) == 2  # nobody stated the data, the run recorded none: said, not left out


def test_the_code_that_travels_keeps_the_rules():
    assert check_code(code_files()) == []
    assert auto_maps(code_files())["AutoModel"] == ["modeling_fusedvlm.FusedVLMModel"]


def test_the_license_of_the_code_is_the_package_s_own():
    assert (ROOT / "hub_cards" / "templates" / "apache-2.0.md").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import fusedvlm", "imports fusedvlm"),
        ("import scipy.stats", "imports scipy"),
        ("from ..x import y", "only `from .name import x`"),
        ("from .missing import y", ".missing does not travel"),
        ("from . import other", "only `from .name import x`"),
        ("if True: from .other import y", "does not see the import of .other"),
        ('"""\nfrom .ghost import x\n"""', "reads like an import of .ghost"),
    ],
)
def test_code_that_would_break_elsewhere_is_named(tmp_path, source, message):
    (tmp_path / "other.py").write_text("y = 1\n")
    (tmp_path / "bad.py").write_text(source + "\n")
    found = check_code([tmp_path / "bad.py", tmp_path / "other.py"])
    assert any("bad.py" in what and message in what for what in found), found


def test_folders_of_this_machine_leave_the_configuration(tiny_family, tmp_path):
    local = json.loads((tiny_family / "tiny-m7" / "config.json").read_text())
    assert str(tiny_family.parent) in json.dumps(local)  # the test would prove nothing otherwise
    files, notes = bundle(tiny_family / "tiny-m7")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        assert str(tiny_family.parent) not in read_content(files[name]).decode()
    assert any("vision tower" in note for note in notes)
    config = json.loads(read_content(files["config.json"]))
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_fusedvlm.FusedVLMForConditionalGeneration"
    assert {key: value for key, value in config.items() if "name_or_path" in key} == {
        "text_model_name_or_path": None,
        "vision_model_name_or_path": None,
    }


def test_a_reference_keeps_its_commit(model, processor, tmp_path):
    folder = save_variant(tmp_path / "v", model, processor, 7, text="org/llm")
    assert not self_contained(folder)
    config = json.loads(read_content(bundle(folder)[0]["config.json"]))
    assert (config["text_model_name_or_path"], config["text_model_revision"]) == ("org/llm", COMMIT)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json", "model.safetensors"])
def test_an_incomplete_variant_is_named(tiny_family, tmp_path, name):
    import shutil

    shutil.copytree(tiny_family / "tiny-m7", tmp_path / "v")
    (tmp_path / "v" / name).unlink()
    with pytest.raises(ValueError, match=r"not a complete variant"):
        bundle(tmp_path / "v")


def test_what_stays_at_home_is_said(tiny_family, tmp_path):
    import shutil

    shutil.copytree(tiny_family / "tiny-m7", tmp_path / "v")
    for name in ("optimizer.pt", "training_args.bin", "notes.txt"):
        (tmp_path / "v" / name).write_text("x")
    files, notes = bundle(tmp_path / "v")
    for name in ("optimizer.pt", "training_args.bin", "notes.txt"):
        assert name not in files
        assert f"{name} stays here" in notes


def test_names_of_repositories_and_schemes_are_not_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "llm").mkdir(parents=True)
    assert is_local("runs/llm")
    assert is_local("/data/llm")
    assert is_local("./llm")
    assert not is_local("org/llm")
    assert not is_local("open_clip:ViT-B-32/laion2b")
    assert not is_local(None)

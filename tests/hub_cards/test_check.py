"""`fusedvlm check`: sound repositories pass, every kind of damage is one line that names the file."""

import copy
import gzip
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedvlm.hub_cards.check.isolated_loading import Loaded
from fusedvlm.hub_cards.check.leaks import looks_like_pickle
from fusedvlm.hub_cards.check.repository_check import check_files, check_folder, check_static
from fusedvlm.hub_cards.release.release_files import checksums
from fusedvlm.tests import fork_server


@pytest.fixture
def folder(tiny_release, tmp_path):
    """A complete repository to damage."""
    tiny_release.write(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture(autouse=True)
def nothing_is_loaded(request, monkeypatch):
    """Loading takes seconds; only tests of loading do it."""
    if "loaded" not in request.node.name:
        monkeypatch.setattr("fusedvlm.hub_cards.check.repository_check.load_isolated", lambda folder: Loaded(None))


def rehash(folder):
    """Make checksums.json agree with the folder, so that other checks have to notice."""
    from fusedvlm.hub_cards.check.repository_check import folder_files

    (folder / "checksums.json").write_bytes(checksums(folder_files(folder)))


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_release_and_what_it_writes_are_sound(tiny_release, folder):
    assert check_files(tiny_release.files, tiny_release.repo_id) == []
    assert check_folder(folder) == []
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # the Hub's own
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    assert check_folder(folder) == []


def test_another_repository_s_files_are_noticed(tiny_release):
    (problem,) = check_files(tiny_release.files, "eve/tiny-m7")
    assert "is about ada/tiny-m7, this is eve/tiny-m7" in str(problem)


def test_every_single_missing_file_is_named(tiny_release, folder):
    for name in tiny_release.files:
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        problems = check_folder(folder)
        assert any(problem.file == name and "missing" in problem.message for problem in problems), name
        path.write_bytes(content)
    assert check_folder(folder) == []


def test_every_single_changed_byte_is_named(tiny_release, folder):
    for name in tiny_release.files:
        path = folder / name
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        path.write_bytes(changed)
        files = {problem.file for problem in check_folder(folder)}
        assert name in files or (name == "checksums.json" and files), name
        path.write_bytes(content)


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((10**15).to_bytes(8, "little") + path.read_bytes()[8:])


def damage_tensor_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.projector.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_tensor_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.projector.weight"] = tensors["model.projector.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_tensor_extra(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "optimizer.state": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})


def damage_zip(folder):
    with zipfile.ZipFile(folder / "notes.txt", "w") as archive:
        archive.writestr("data.pkl", b"x")


def damage_card_license(folder):
    replace_text(folder / "README.md", "license: mit", "license: apache-2.0")
    rehash(folder)


DAMAGES = {
    "truncated weights": (damage_truncate, "model.safetensors", "damaged weights"),
    "weights with a mad header": (damage_header, "model.safetensors", "damaged weights"),
    "a tensor too few": (damage_tensor_missing, "model.safetensors", "model.projector.weight"),
    "a tensor of another shape": (damage_tensor_shape, "model.safetensors", "has shape"),
    "a tensor too many": (damage_tensor_extra, "model.safetensors", "optimizer.state"),
    "an edited score": (lambda f: replace_text(f / "README.md", "0.322", "0.999"), "README.md", "0.999"),
    "an edited score in the metadata": (
        lambda f: replace_text(f / "README.md", "value: 0.3218", "value: 0.9218"), "README.md", "model-index",
    ),
    "another license in the card": (damage_card_license, "README.md", "license is 'apache-2.0'"),
    "an edited fact": (lambda f: edit_json(f / "facts.json", lambda d: d["counted"].update(weight_bytes=1)), "facts.json", "weight_bytes"),
    "results other than the facts": (
        lambda f: edit_json(f / "results.json", lambda d: d["scores"][0].update(score=0.9)), "results.json", "not what facts.json says",
    ),
    "facts without a license": (lambda f: edit_json(f / "facts.json", lambda d: d["stated"].update(license=None)), "facts.json", "No license"),
    "broken JSON": (lambda f: (f / "config.json").write_text("{"), "config.json", "damaged"),
    "JSON that is none of ours": (lambda f: (f / "facts.json").write_text("[1]"), "facts.json", "must hold keys and values"),
    "text that is no text": (lambda f: (f / "README.md").write_bytes(b"\xff\xfe\x00"), "README.md", "damaged"),
    "a nonsense configuration": (
        lambda f: edit_json(f / "config.json", lambda d: d.update(vision_config={"model_type": "clip_vision_model", "hidden_size": 5})), "config.json", "",
    ),
    "a configuration of something else": (lambda f: edit_json(f / "config.json", lambda d: d.update(model_type="llama")), "config.json", "not a FusedVLM variant"),
    "m out of range": (lambda f: edit_json(f / "config.json", lambda d: d.update(num_visual_tokens=99)), "config.json", "99"),
    "a pickle": (lambda f: (f / "training_args.bin").write_bytes(pickle.dumps([1])), "training_args.bin", "pickle"),
    "a pickle under a kind name": (lambda f: (f / "training" / "notes.json").write_bytes(pickle.dumps([1])), "training/notes.json", "pickle"),
    "a pickle with something behind it": (lambda f: (f / "notes.md").write_bytes(pickle.dumps([1]) + b"# notes"), "notes.md", "pickle"),
    "an old pickle under a kind name": (lambda f: (f / "notes.md").write_bytes(b"cos\nsystem\n(S'ls'\ntR."), "notes.md", "pickle"),
    "a pickle as weights": (lambda f: (f / "more.safetensors").write_bytes(pickle.dumps(list(range(99)))), "more.safetensors", "pickle"),
    "a zip under a kind name": (damage_zip, "notes.txt", "zip"),
    "a compressed file": (lambda f: (f / "notes.txt").write_bytes(gzip.compress(b"x")), "notes.txt", "archive"),
    "a program": (lambda f: (f / "run.sh").write_text("ls"), "run.sh", "not a kind of file"),
    "a token": (lambda f: (f / "notes.txt").write_text("hf_" + "a1B2" * 9), "notes.txt", "Hugging Face token"),
    "a token in the tokenizer": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda d: d.update(token="hf_" + "a1B2" * 9)), "tokenizer_config.json", "Hugging Face token",
    ),
    "a private key": (lambda f: (f / "notes.md").write_text("-----BEGIN OPENSSH PRIVATE KEY-----"), "notes.md", "Private Key"),
    "a folder in a configuration": (
        lambda f: edit_json(f / "processor_config.json", lambda d: d.update(cache="/scratch/me/cache")), "processor_config.json", "/scratch/me/cache",
    ),
    "a local language model": (
        lambda f: edit_json(f / "config.json", lambda d: d.update(text_model_name_or_path="../llm")), "config.json", "../llm",
    ),
    "an unpinned language model": (
        lambda f: edit_json(f / "config.json", lambda d: d.update(text_model_name_or_path="org/llm", text_model_revision="main")), "config.json", "'main'",
    ),
    "code that needs this package": (
        lambda f: (f / "modeling_fusedvlm.py").write_text("import fusedvlm\n" + (f / "modeling_fusedvlm.py").read_text()), "modeling_fusedvlm.py", "imports fusedvlm",
    ),
    "code that is no Python": (lambda f: (f / "modeling_fusedvlm.py").write_text("def ("), "modeling_fusedvlm.py", "not Python"),
    "a processor of another variant": (
        lambda f: edit_json(f / "processor_config.json", lambda d: d.update(num_visual_tokens=1)), "processor_config.json", "num_visual_tokens is 1, not 7",
    ),
    "an edited sentence": (lambda f: replace_text(f / "README.md", "One causal fusion", "One acausal fusion"), "README.md", "not the text"),
    "a number in the training table": (lambda f: replace_text(f / "README.md", "| seed | 3 |", "| seed | 4 |"), "README.md", "not the text"),
    "facts that list other files": (lambda f: edit_json(f / "facts.json", lambda d: d["files"].pop()), "facts.json", "lists the files"),
    "a class that is not there": (
        lambda f: edit_json(f / "config.json", lambda d: d["auto_map"].update(AutoModel="modeling_fusedvlm.Nothing")), "config.json", "Nothing",
    ),
    "a class that is no name": (
        lambda f: edit_json(f / "config.json", lambda d: d["auto_map"].update(AutoModel="modeling_fusedvlm.(")), "config.json", "AutoModel",
    ),
    "no classes at all": (lambda f: edit_json(f / "processor_config.json", lambda d: d.pop("auto_map")), "processor_config.json", "AutoProcessor"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_even_where_the_checksums_agree(folder, name):
    damage, file, message = DAMAGES[name]
    damage(folder)
    rehash(folder)
    problems = check_folder(folder)
    assert any(problem.file == file and message in problem.message for problem in problems), problems
    assert all(len(str(problem).splitlines()) == 1 for problem in problems)
    assert not any("a1B2" in str(problem) for problem in problems)  # a report never repeats a secret


JUNK = (None, "x", -1, [], {}, 1e308, True, "a\nb", 0.5)


def leaves(value, path=()):
    """Paths to everything in nested data."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in pairs:
        yield from leaves(entry, (*path, key))


@pytest.mark.parametrize("name", ["facts.json", "config.json", "processor_config.json"])
def test_junk_anywhere_is_told_and_never_a_crash(folder, name):
    original = json.loads((folder / name).read_text())
    generator = random.Random(name)
    for path in generator.choices(sorted(leaves(original), key=str), k=40):
        data = copy.deepcopy(original)
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        if path:
            parent[path[-1]] = generator.choice(JUNK)
        else:
            data = generator.choice(JUNK)
        (folder / name).write_text(json.dumps(data))
        rehash(folder)
        problems = check_folder(folder)
        assert problems or name != "facts.json" or data == original, (path, data)
        assert all(len(str(problem).splitlines()) == 1 for problem in problems)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3}', '{"files": {"README.md": 1}}', "null"])
def test_checksums_that_are_none(folder, content):
    (folder / "checksums.json").write_text(content)
    assert any(problem.file == "checksums.json" or "not listed" in problem.message for problem in check_folder(folder))


def test_an_extra_file_is_not_listed(folder):
    (folder / "notes.txt").write_text("hello")
    (problem,) = check_folder(folder)
    assert str(problem) == "notes.txt: not listed in checksums.json"


def test_a_missing_shard_and_an_index_that_lies(tiny_release, folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    (folder / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate((first, second), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    rehash(folder)
    assert any(problem.file == "model.safetensors.index.json" for problem in check_static(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    rehash(folder)
    assert {problem.file for problem in check_static(folder)} == {"facts.json"}  # which counted another file
    (folder / "model-00001-of-00002.safetensors").unlink()
    rehash(folder)
    assert any("tensors are missing" in problem.message for problem in check_static(folder))


def test_plain_files_do_not_look_like_pickles(tiny_release, folder):
    for path in folder.rglob("*"):
        if path.is_file():
            assert looks_like_pickle(path) is None, path


def test_nothing_of_a_changed_folder_is_run(folder, monkeypatch):
    def refuse(folder):
        raise AssertionError("the code was run")

    monkeypatch.setattr("fusedvlm.hub_cards.check.repository_check.load_isolated", refuse)
    with (folder / "modeling_fusedvlm.py").open("a") as file:
        file.write("import os\n")
    assert [problem.file for problem in check_folder(folder)] == ["modeling_fusedvlm.py"]


# Imports take seconds, so one process runs several commands; each prints its exit code on a line of its own.
COMMANDS = """
import json, sys
from fusedvlm.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fusedvlm", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        print(f"\\nEND {code}", file=stream, flush=True)
"""


def fusedvlm(*commands, **environment):
    """(exit code, standard output, standard error) of each command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    program = [fork_server.executable(), "-c", COMMANDS, json.dumps([list(map(str, command)) for command in commands])]
    run = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    outputs, errors = (re.split(r"\nEND (\d+)\n", stream) for stream in (run.stdout, run.stderr))
    return [(int(outputs[i + 1]), outputs[i], errors[i]) for i in range(0, 2 * len(commands), 2)]


def test_loaded_without_the_package_on_the_command_line(folder):
    ((code, output, errors),) = fusedvlm(["check", folder])
    assert code == 0, output + errors
    assert "loads and answers without this package" in output


def test_loaded_with_a_language_model_that_nobody_has(tmp_path):
    from fusedvlm.hub_cards.release.variant_release import build_family
    from fusedvlm.tests.hub_cards.tiny_family import COMMIT, write_family

    release = build_family(write_family(tmp_path / "f", text="org/llm"), "ada", license="mit")[0]
    release.write(tmp_path / "repository")
    (problem,) = check_folder(tmp_path / "repository")
    assert f"language model org/llm at commit {COMMIT}" in problem.message


def test_exit_codes_and_json(folder, tmp_path):
    (folder / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    bad, nowhere, empty = fusedvlm(
        ["check", folder, "--no-load", "--json"], ["check", tmp_path / "nowhere"], ["check", tmp_path / "empty"]
    )
    assert bad[0] == 1
    (report,) = json.loads(bad[1])
    assert report["problems"] == [{"file": "notes.txt", "message": "not listed in checksums.json"}]
    assert (nowhere[0], empty[0]) == (2, 2)
    assert "no such folder" in nowhere[2]
    assert "neither a variant" in empty[2].strip().splitlines()[-1]


def test_a_repository_is_downloaded_and_checked(tiny_release, tmp_path, hub_server, user, online):
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=hub_server.endpoint, token=user)
    api.create_repo(tiny_release.repo_id, private=True)
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in tiny_release.files.items()
    ]
    api.create_commit(tiny_release.repo_id, operations, commit_message="all of it")
    api.create_tag(tiny_release.repo_id, tag="v1.0")
    environment = {
        "HF_ENDPOINT": hub_server.endpoint, "HF_TOKEN": user, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    api.create_commit(
        tiny_release.repo_id, [CommitOperationAdd("evil.bin", pickle.dumps([1]))], commit_message="somebody else's"
    )
    release, head, no_repository, no_revision, space = fusedvlm(
        ["check", tiny_release.repo_id, "--revision", "v1.0", "--no-load"],
        ["check", tiny_release.repo_id, "--no-load"],
        ["check", "ada/nothing", "--no-load"],
        ["check", tiny_release.repo_id, "--revision", "v9", "--no-load"],
        ["space", tiny_release.repo_id, "--revision", "v1.0", "--output", tmp_path / "space"],
        **environment,
    )
    assert (release[0], f"{tiny_release.repo_id}@v1.0: sound" in release[1]) == (0, True), release
    assert (head[0], "evil.bin" in head[1]) == (1, True), head
    for code, _, errors in (no_repository, no_revision):
        assert code == 2
        assert errors.strip().splitlines()[-1].startswith("fusedvlm: ada/")
    assert space[0] == 0, space
    pinned = json.loads((tmp_path / "space" / "space.json").read_text())
    commit = api.model_info(tiny_release.repo_id, revision="v1.0").sha
    assert (pinned["model"], pinned["revision"]) == (tiny_release.repo_id, commit)
    assert not any(user in text for run in (release, head, no_repository, no_revision) for text in run[1:])


def test_a_family_is_checked_variant_by_variant(tiny_family, tmp_path):
    from fusedvlm.hub_cards.check.check_all import verify
    from fusedvlm.hub_cards.release.variant_release import build_family

    for release in build_family(tiny_family, "ada", license="mit"):
        release.write(tmp_path / release.repo_id.partition("/")[2])
    (tmp_path / "tiny-m7" / "config.json").unlink()
    reports = verify(str(tmp_path), load=False)
    assert [bool(report.problems) for report in reports] == [False, False, True]
    shutil.rmtree(tmp_path / "tiny-m7")
    assert [report.problems for report in verify(str(tmp_path), load=False)] == [[], []]

"""The command line, run as a user runs it: exit codes, JSON, one clear line for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedvlm
from fusedvlm.model_source import require_folder_or_repository, require_source
from fusedvlm.tests import fork_server, tiny

INSTALLED = str(Path(sys.executable).with_name("fusedvlm"))


def run(*arguments, cwd=None, command=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [command or fork_server.executable("fusedvlm"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        tiny.picture(number).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(2)]


def test_help_lists_the_commands():
    result = run("--help", command=INSTALLED)
    assert result.returncode == 0
    assert all(
        command in result.stdout
        for command in ("quickstart", "describe", "info", "convert", "profile", "plan", "scaling")
    )
    assert run("--version", command=INSTALLED).stdout.strip() == fusedvlm.__version__


@pytest.mark.parametrize(
    "arguments", [["describe"], ["nothing"], ["describe", "a.png", "--model"], ["quickstart", "--seeds", "0"]]
)
def test_wrong_use_exits_with_two(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr


def test_describe_several_images_and_questions_as_json(variant, pictures):
    result = run(
        "describe",
        *pictures,
        "-q",
        "what is it?",
        "-q",
        "sure?",
        "--model",
        variant,
        "-m",
        5,
        "--max-new-tokens",
        4,
        "--json",
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)["answers"]
    assert [(a["images"], a["question"]) for a in answers] == [
        ([pictures[0]], "what is it?"), ([pictures[0]], "sure?"), ([pictures[1]], "what is it?"), ([pictures[1]], "sure?"),
    ]  # fmt: skip
    assert {a["num_visual_tokens"] for a in answers} == {5}


def test_describe_answers_as_the_library_does(variant, pictures):
    from fusedvlm import VisualChat

    expected = VisualChat(str(variant)).ask(pictures, "the same?", max_new_tokens=4)
    result = run(
        "describe", *pictures, "--together", "-q", "the same?", "--model", variant, "--max-new-tokens", 4, "--json"
    )
    assert json.loads(result.stdout)["answers"][0]["answer"] == expected


def test_info_counts_parameters(variant, model):
    facts = json.loads(run("info", variant, "--json").stdout)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters"]["language model"] == sum(
        p.numel() for n, p in model.named_parameters() if n.startswith(("model.language_model", "lm_head"))
    )
    assert facts["trained_num_visual_tokens"] == [1, 7, 12]
    assert facts["backbones"]["language_model"]["from"] == model.config.text_model_name_or_path
    text = run("info", variant).stdout
    assert f"{facts['parameters']['total']:,}" in text
    assert "1, 7, 12" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["missing.png"], "missing.png: no such file"),
        (["-q", "  "], "Question 0 is empty"),
        (["-m", "99"], "num_visual_tokens=99 is out of range: this model takes 1 to 12"),
        (["-q", "word " * 10_000], "reads at most 1024"),
    ],
)
def test_bad_input_is_one_line_and_exit_two(variant, pictures, change, words):
    images = change if change[0].endswith(".png") else pictures[:1]
    options = [] if change[0].endswith(".png") else change
    result = run("describe", *images, "--model", variant, "--max-new-tokens", 2, *options)
    assert result.returncode == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("fusedvlm: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_no_variant(tmp_path, pictures):
    for arguments in (["info", tmp_path], ["describe", pictures[0], "--model", tmp_path]):
        result = run(*arguments)
        assert result.returncode == 2
        assert f"{tmp_path}" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["describe", "a.png", "--model", "runs/nope"], "--model=runs/nope does not exist"),
        (["info", "nope"], "model=nope does not exist"),
        (["evaluate", "nope", "--tasks", "POPE"], "MODEL=nope does not exist"),
        (["serve", "nope"], "MODEL=nope does not exist"),
        (["demo", "nope"], "nope: no such folder"),
        (["profile", "--model", "nope"], "--model=nope does not exist"),
        (["scaling", "divergence", "--model", "nope", "--dataset", "x"], "--model=nope does not exist"),
        (["scaling", "fit", "nope.csv"], "nope.csv: no such file"),
        (["scaling", "report", "nope"], "nope: no such file or directory"),
        (["quickstart", "--output", "/proc/x"], "/proc/x: no such file or directory"),
        (["check", "nope"], "nope: no such folder, and not a repository id"),
        (["card", "nope"], "nope: no such folder"),
        (["push", "nope", "--repo", "me/x"], "nope: no such folder"),
        (["space", "nope"], "nope: no such folder, and not a repository id"),
        (["train", "generation", "--preset", "nope"], "There is no recipe 'nope'"),
        (["train", "contrastive", "--learning_rat", "3"], "did you mean 'learning_rate'?"),
        (["train", "contrastive", "--data.sources", "nope.yaml"], "data.sources=nope.yaml: no such file"),
        (["train", "contrastive", "--data.sources.0.path", "nope.json"], "nope.json: no such file"),
        (["data", "show", "nope.json", "--type", "llava"], "nope.json: no such file"),
        (["data", "check", "nope.yaml"], "nope.yaml: no such file"),
    ],
)
def test_what_is_not_there_is_said_before_pytorch_is_imported(words, said, tmp_path):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from fusedvlm.cli import main; main()", *words],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fusedvlm: ")]
    assert said in line
    heavy = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()} & {"torch", "transformers"}
    assert not heavy


def test_debug_stands_anywhere_and_an_interrupt_is_said(tmp_path, monkeypatch, capsys):
    from fusedvlm import cli

    monkeypatch.setattr(sys, "argv", ["fusedvlm", "info", "nope", "--debug"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr("fusedvlm.costs.cli.require_source", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert "Interrupted." in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fusedvlm", "data", "questions", "nope.json", "--type", "svit", "-o", "q.jsonl"])
    monkeypatch.setattr(
        "fusedvlm.data.generate.cli.check_spec", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert "Interrupted: answers so far are kept; the same command goes on where it was." in capsys.readouterr().err
    assert {words.split()[0] for words in cli.AFTER_INTERRUPT} <= set(cli.COMMANDS)


def test_a_repository_is_found_although_a_folder_has_its_owners_name(tmp_path, monkeypatch):
    """`fusedvlm check me/x` where the folder me/ has no x in it means the Hub; a model's field says what else it may be."""
    (tmp_path / "me").mkdir()
    monkeypatch.chdir(tmp_path)
    require_folder_or_repository("me/x")
    with pytest.raises(ValueError, match="For me/x on the Hub go to a folder without a me in it"):
        require_source("text", "me/x")
    require_source("text", "you/x")

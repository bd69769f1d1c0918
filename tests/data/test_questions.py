"""Questions from descriptions: a server that misbehaves, killed runs, a local model; journals."""

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fusedvlm.data import load_source
from fusedvlm.data.cli import app
from fusedvlm.data.generate.llm_client import Endpoint, LocalModel, Unanswered
from fusedvlm.data.generate.questions import QuestionOptions, prompt_for, write_questions
from fusedvlm.data.sample_files import Journal
from fusedvlm.tests import fork_server, tiny
from fusedvlm.tests.data.server import chat_server

CHOICE = "Question: What is on the table?\nA. A cup\nB. A book\nC. A lamp\nD. A hat\nAnswer: C\n"


def sample(number: int) -> dict:
    return {
        "id": str(number),
        "source": "svit",
        "images": [f"/images/{number}.jpg"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": f"Picture {number} shows " + "many things " * 10}],
            },
        ],
    }


def is_choice(body: dict) -> bool:
    return "multiple-choice" in body["messages"][0]["content"]


def number_of(body: dict) -> int:
    return int(re.search(r"Picture (\d+)", body["messages"][0]["content"])[1])


def good(body: dict, before: int = 0) -> str:
    number = number_of(body)
    if is_choice(body):
        return CHOICE.replace("the table", f"table {number}")
    return f"Question: Is thing {number} there?\nAnswer: Yes\n\nQuestion: Is thing {number} red?\nAnswer: No\n"


def endpoint(address: str, **kwargs) -> Endpoint:
    return Endpoint(address, "m", **{"pause": 0.001, "tries": 4, **kwargs})


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_samples(tmp_path):
    out = tmp_path / "q.jsonl"
    with chat_server(good) as (address, seen):
        report = write_questions([sample(n) for n in range(5)], out, endpoint(address), QuestionOptions())
    assert report["kept"] == {"multiple_choice": 5, "yes_no": 10}
    assert report["answers"] == {"yes_no": {"No": 5, "Yes": 5}, "multiple_choice": {"C": 5}}
    rows = list(load_source({"type": "chat", "path": str(out)}))
    assert len(rows) == 15
    assert rows[0]["images"] == ["/images/0.jpg"]
    assert rows[0]["messages"][0]["content"][1]["text"] == "Is thing 0 there?\nAnswer with Yes or No."
    assert "A. A cup\nB. A book" in rows[2]["messages"][0]["content"][1]["text"]
    assert len({row["id"] for row in rows}) == 15
    assert all(body["model"] == "m" for _, body in seen)


def test_a_server_that_misbehaves_loses_nothing(tmp_path):
    """Each prompt meets another trouble first: too many requests, a crash, no JSON, no text, a hang-up."""
    troubles = [429, 503, b"<html>", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', None]

    def answer(body, before):
        return troubles[number_of(body) % len(troubles)] if before == 0 else good(body)

    with chat_server(answer) as (address, seen):
        report = write_questions(
            [sample(n) for n in range(12)], tmp_path / "q.jsonl", endpoint(address), QuestionOptions()
        )
    assert report["unanswered"] == 0
    assert report["kept"] == {"multiple_choice": 12, "yes_no": 24}
    assert len(seen) == 48


def test_wrong_formats_are_counted_by_reason(tmp_path):
    def answer(body, before):
        if is_choice(body):
            return CHOICE.replace("Answer: C", "Answer: the lamp") if number_of(body) else "I cannot do that."
        return "Question: Is it red?\nAnswer: Maybe\n\nQuestion: Is it blue?\nAnswer: No"

    with chat_server(answer) as (address, _):
        report = write_questions(
            [sample(n) for n in range(3)], tmp_path / "q.jsonl", endpoint(address), QuestionOptions()
        )
    assert report["dropped"]["multiple_choice"] == {
        "answer is not one letter of A to D": 2,
        "no question in the reply": 1,
    }
    assert report["dropped"]["yes_no"] == {"answer is not Yes or No": 3}
    assert report["kept"] == {"multiple_choice": 0, "yes_no": 3}


def test_what_stays_unanswered_is_asked_again_by_the_next_run_only(tmp_path):
    out = tmp_path / "q.jsonl"
    options = QuestionOptions(kinds=("yes_no",))
    with chat_server(lambda body, _: 500 if number_of(body) == 2 else good(body)) as (address, seen):
        report = write_questions([sample(n) for n in range(4)], out, endpoint(address, tries=2), options)
        assert report["unanswered"] == 1
        assert len(rows_of(out)) == 6
        assert len(seen) == 5
    with chat_server(good) as (address, seen):
        report = write_questions([sample(n) for n in range(4)], out, endpoint(address), options)
        assert (report["unanswered"], len(seen), len(rows_of(out))) == (0, 1, 8)


def test_a_silent_server_stops_the_run(tmp_path):
    with chat_server(lambda body, _: 503) as (address, seen), pytest.raises(Unanswered, match="HTTP 503"):
        write_questions(
            [sample(n) for n in range(200)],
            tmp_path / "q.jsonl",
            endpoint(address, tries=1),
            QuestionOptions(concurrency=2),
        )
    assert len(seen) < 60


def test_a_refusal_stops_at_once_and_the_key_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with chat_server(lambda body, _: 401) as (address, seen):
        with pytest.raises(ValueError, match=r"HTTP 401 no, Bearer \*\*\*.*\$MY_KEY") as caught:
            endpoint(address, api_key_env="MY_KEY")([{"role": "user", "content": "x"}])
        assert "very-secret" not in str(caught.value) + repr(endpoint(address, api_key_env="MY_KEY"))
        assert seen[0][0]["Authorization"] == "Bearer sk-very-secret"
        assert len(seen) == 1


def test_no_key_no_header(monkeypatch):
    """A Hub token on this machine is nobody else's business."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server(lambda body, _: "fine") as (address, seen):
        assert endpoint(address)([{"role": "user", "content": "x"}]) == "fine"
        assert "Authorization" not in seen[0][0]


def test_waits_grow_and_respect_the_server(monkeypatch):
    waits = []
    with chat_server(lambda body, before: 429 if before < 1 else 500) as (address, _), pytest.raises(Unanswered):
        endpoint(address, pause=0.001, tries=4, sleep=waits.append)([{"role": "user", "content": "x"}])
    assert waits == [0.01, 0.002, 0.004]


def test_left_out_samples_are_counted(tmp_path):
    short, without = sample(1), sample(2)
    short["messages"][-1]["content"] = "A cat."
    without["images"] = []
    with chat_server(good) as (address, _):
        report = write_questions(
            [sample(0), short, without], tmp_path / "q.jsonl", endpoint(address), QuestionOptions()
        )
        assert report["left_out"] == {"description too short": 1, "not one image": 1}
        with pytest.raises(ValueError, match="No sample has an image"):
            write_questions([short], tmp_path / "q.jsonl", endpoint(address), QuestionOptions())


def test_another_author_asks_everything_again(tmp_path):
    with chat_server(good) as (address, seen):
        for author in ("a", "a", "b"):
            write_questions([sample(0)], tmp_path / "q.jsonl", endpoint(address), QuestionOptions(author=author))
        assert len(seen) == 4


def test_the_prompts_show_the_description_and_the_number():
    for kind in ("yes_no", "multiple_choice"):
        prompt = prompt_for(sample(3), kind, 7)
        assert "Picture 3 shows" in prompt
        assert "Write 7 " in prompt


def test_killed_runs_go_on_without_duplicates(tmp_path):
    """SIGKILL in the middle, twice, then to the end: every prompt is in the journal once, every question in the output."""
    rows = tmp_path / "described.jsonl"
    rows.write_text("\n".join(json.dumps(sample(n)) for n in range(40)))
    out = tmp_path / "q.jsonl"

    def slowly(body, before):
        time.sleep(0.02)
        return good(body)

    with chat_server(slowly) as (address, seen):
        command = [
            fork_server.executable("fusedvlm"),
            "data",
            "questions",
            str(rows),
            "--type",
            "chat",
            "-o",
            str(out),
        ]
        command += ["--base-url", address, "--model", "m", "--concurrency", "2", "--json"]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        for kill in range(2):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
            goal = 15 * (kill + 1)
            while len(seen) < goal and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not out.exists()
        with open(f"{out}.journal", "a") as journal:
            journal.write('{"key": "half a li')  # a kill between two writes
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["kept"] == {"multiple_choice": 40, "yes_no": 80}
    assert max(Counter(row["id"] for row in rows_of(out)).values()) == 1
    assert len(rows_of(out)) == 120
    assert len(rows_of(tmp_path / "q.jsonl.journal")) == 80
    assert 80 <= len(seen) <= 80 + 4 * 2  # only what was in flight is asked twice


def test_two_runs_do_not_write_one_journal(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.add({"key": "a"})
        with pytest.raises(ValueError, match="another run"):
            Journal(tmp_path / "j")
    with Journal(tmp_path / "j") as journal:
        assert "a" in journal


def test_journals_refuse_what_they_did_not_write(tmp_path):
    path = tmp_path / "j"
    path.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        Journal(path)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny random causal language model with a chat template."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = tiny.text_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_local_model(chat_model, tmp_path):
    ask = LocalModel(chat_model, max_tokens=8, temperature=1.0, seed=3)
    first = ask([{"role": "user", "content": "hello"}])
    assert isinstance(first, str)
    assert ask([{"role": "user", "content": "hello"}]) == first
    rows = tmp_path / "described.jsonl"
    rows.write_text(json.dumps(sample(1)))
    result = CliRunner().invoke(
        app,
        [
            "questions",
            str(rows),
            "--type",
            "chat",
            "-o",
            str(tmp_path / "q.jsonl"),
            "--local",
            chat_model,
            "--json",
            "--max-tokens",
            "8",
        ],
    )
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["dropped"]["yes_no"] == {"no question in the reply": 1}


def test_a_model_without_a_chat_template_is_refused(chat_model, tmp_path):
    tokenizer = tiny.text_tokenizer()
    LlamaForCausalLM.from_pretrained(chat_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        LocalModel(str(tmp_path))


def test_command_line_use(tmp_path):
    rows = tmp_path / "described.jsonl"
    rows.write_text(json.dumps(sample(1)))
    run = CliRunner().invoke
    command = ["questions", str(rows), "--type", "chat", "-o", str(tmp_path / "q.jsonl")]
    assert "--base-url and --model" in str(run(app, command).exception)
    assert "must start with http" in str(run(app, [*command, "--base-url", "localhost", "--model", "m"]).exception)
    assert "kinds ['maybe']" in str(
        run(app, [*command, "--base-url", "http://x/v1", "--model", "m", "--kind", "maybe"]).exception
    )
    with chat_server(good) as (address, _):
        result = run(app, [*command, "--base-url", address, "--model", "m"])
        assert "3 questions about 1 images" in result.stdout

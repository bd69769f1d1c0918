"""A server answers: at every m, several at a time; what fails is told and asked again; m that is not heeded is noticed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusedvlm.cli import app
from fusedvlm.data.generate.llm_client import Endpoint
from fusedvlm.evaluation import EvaluationResults
from fusedvlm.evaluation.answers.server_answers import ServerAnswers
from fusedvlm.tests.data.server import chat_server
from fusedvlm.tests.evaluation.toys import write_tsv, yes_no_rows


def m_of(body: dict) -> int:
    return body.get("chat_template_kwargs", {}).get("processor_kwargs", {}).get("num_visual_tokens", 0)


def reply(body: dict, text: str, heeds: bool = True, finish: str = "stop") -> bytes:
    message = {"message": {"content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 30 + (m_of(body) if heeds else 0), "total_tokens": 40}
    return json.dumps({"choices": [message], "usage": usage}).encode()


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_tsv(tmp_path / "yes.tsv", yes_no_rows(10))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(address: str, *arguments: str):
    words = [
        "evaluate",
        "a-model",
        "--base-url",
        address,
        "--tasks",
        "yes.tsv",
        "--concurrency",
        "3",
        "--output",
        "out",
    ]
    return CliRunner().invoke(app, [*words, *arguments])


def test_a_server_is_asked_at_every_m(place):
    def answer(body, before):
        # Cut answers are answers: the cap is part of the task.
        return reply(body, "Yes" if m_of(body) == 8 else "no", finish="length")

    with chat_server(answer) as (address, seen):
        done = evaluate(address, "--m", "1,8")
        assert done.exit_code == 0, done.exception
    results = EvaluationResults.load(Path("out/results.json"))
    assert [(row.num_visual_tokens, row.score) for row in results.scores] == [(1, 0.5), (8, 0.5)]
    asked = [body for _, body in seen if body["max_tokens"] == 32]
    assert len(asked) == 20
    assert {m_of(body) for body in asked} == {1, 8}
    content = asked[0]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert asked[0]["temperature"] == 0
    assert address not in Path("out/results.json").read_text()  # addresses of machines are nobody's business
    with chat_server(lambda body, before: 500) as (other, _):
        pass
    assert other != address


def test_what_fails_is_told_and_asked_again_by_the_next_run(place):
    def fails(body, before):
        return 400 if "is 3 red?" in str(body["messages"]) else reply(body, "Yes")

    broken = [True]
    with chat_server(lambda body, before: fails(body, before) if broken[0] else reply(body, "no")) as (address, seen):
        done = evaluate(address, "--m", "4")
        assert isinstance(done.exception, RuntimeError)
        assert "1 of 10 answers are missing; run the same command again" in str(done.exception)
        assert not Path("out/results.json").exists()
        broken[0] = False
        before = len(seen)
        done = evaluate(address, "--m", "4")
        assert done.exit_code == 0, done.exception
        assert len(seen) == before + 1


def test_a_server_that_does_not_heed_m_is_found_out(place):
    with chat_server(lambda body, before: reply(body, "Yes", heeds=False)) as (address, seen):
        done = evaluate(address, "--m", "1,8")
        assert "The server does not heed m: prompts at m=1 and m=8 have 30 and 30 tokens" in str(done.exception)
        assert len(seen) == 2
        assert evaluate(address, "--m", "8").exit_code == 0  # at one m there is nothing to heed


def test_wrong_use_of_a_server(place):
    with chat_server(lambda body, before: 401) as (address, _):
        assert "--base-url needs --m" in str(evaluate(address).exception)
        assert "refused the request" in str(evaluate(address, "--m", "4").exception)
    with chat_server(lambda body, before: 400) as (address, _):
        assert "None of 10 requests was answered" in str(evaluate(address, "--m", "4").exception)


def test_a_bare_question_needs_the_weights(place):
    from fusedvlm.evaluation.answers.variant_answers import Asked

    server = ServerAnswers(Endpoint("http://127.0.0.1:9/v1", "m"))
    asked = Asked("Question: what?", "Question: what?", (), 8)
    assert server.messages(asked)[0]["content"][0]["text"] == "Question: what?"
    with pytest.raises(ValueError, match="--bare-question needs the weights"):
        server.messages(replace(asked, question="what?"))

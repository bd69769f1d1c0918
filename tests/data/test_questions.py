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
from fusedvlm.data.generate.journal import Journal
from fusedvlm.data.generate.llm_client import (
    Declined,
    Endpoint,
    LocalModel,
    RateLimit,
    Unanswered,
    is_cut,
    seconds_asked,
)
from fusedvlm.data.generate.parallel_work import SILENT
from fusedvlm.data.generate.questions import QuestionOptions, prompt_for, write_questions
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
    rate = RateLimit(clock=lambda: sum(waits), sleep=waits.append)
    with chat_server(lambda body, before: 429 if before < 1 else 500) as (address, _), pytest.raises(Unanswered):
        endpoint(address, pause=0.001, tries=4, rate=rate)([{"role": "user", "content": "x"}])
    assert waits == pytest.approx([0.01, 0.001, 0.002, 0.004])  # what the server asks for is no try


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
    hello = [{"role": "user", "content": "hello"}]
    with pytest.raises(Declined, match="cut after 8 tokens"):
        ask(hello)
    ask.max_tokens = 9  # as if it had ended by itself
    first = ask(hello)
    assert isinstance(first, str)
    assert "hello" not in first
    assert ask(hello) == first
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
    report = json.loads(result.stdout)
    assert (report["cut"], report["unanswered"]) == (2, 0)
    rows = rows_of(tmp_path / "q.jsonl.declined.jsonl")
    assert [(row["id"], row["question"], row["why"]) for row in rows] == [
        ("1", "yes_no", "cut"),
        ("1", "multiple_choice", "cut"),
    ]


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


# -- what is refused, cut, limited, shared out, or asked offline -------------------------------------------------------

FINISHED = {"finish_reason": "length", "message": {"role": "assistant", "content": "Question: Is it"}}
FILTERED = {"finish_reason": "content_filter", "message": {"role": "assistant", "content": ""}}
SAYS_NO = {"finish_reason": "stop", "message": {"role": "assistant", "content": None, "refusal": "I cannot."}}


def choice(content: dict) -> bytes:
    return json.dumps({"choices": [content], "usage": {"total_tokens": 100}}).encode()


def test_refusals_and_cut_replies_are_per_item_counted_kept_apart_and_not_asked_again(tmp_path):
    odd = {1: 400, 2: choice(FINISHED), 3: choice(FILTERED), 4: choice(SAYS_NO), 5: 413, 6: 422}
    out, options = tmp_path / "q.jsonl", QuestionOptions(kinds=("yes_no",))
    with chat_server(lambda body, _: odd.get(number_of(body)) or good(body)) as (address, seen):
        report = write_questions([sample(n) for n in range(8)], out, endpoint(address), options)
        assert (report["refused"], report["cut"], report["unanswered"]) == (5, 1, 0)
        assert {row["id"]: row["why"] for row in rows_of(tmp_path / "q.jsonl.declined.jsonl")} == {
            "1": "refused", "2": "cut", "3": "refused", "4": "refused", "5": "refused", "6": "refused",
        }  # fmt: skip
        assert len(rows_of(out)) == 4
        assert len(seen) == 8
    with chat_server(good) as (address, seen):
        again = write_questions([sample(n) for n in range(8)], out, endpoint(address), options)
        assert (again["refused"], len(seen)) == (5, 0)
        retry = QuestionOptions(kinds=("yes_no",), retry_declined=True)
        last = write_questions([sample(n) for n in range(8)], out, endpoint(address), retry)
        assert (last["refused"], last["cut"], len(seen)) == (0, 0, 6)
    assert not (tmp_path / "q.jsonl.declined.jsonl").exists()


@pytest.mark.parametrize("count", [3, 200])
def test_a_server_that_refuses_everything_is_wrong_itself_and_nothing_is_remembered(tmp_path, count):
    out = tmp_path / "q.jsonl"
    with (
        chat_server(lambda body, _: 400) as (address, seen),
        pytest.raises(ValueError, match=r"refused|without a usable"),
    ):
        write_questions([sample(n) for n in range(count)], out, endpoint(address), QuestionOptions(concurrency=2))
    assert len(seen) <= SILENT + 4
    with chat_server(good) as (address, _):
        report = write_questions([sample(n) for n in range(count)], out, endpoint(address), QuestionOptions())
    assert (report["refused"], report["descriptions"]) == (0, count)


@pytest.mark.parametrize("code", [401, 404])
def test_a_wrong_key_or_address_stops_the_run_and_blocks_nothing(tmp_path, code):
    out = tmp_path / "q.jsonl"
    with chat_server(lambda body, _: code) as (address, _), pytest.raises(ValueError, match=f"HTTP {code}"):
        write_questions([sample(0)], out, endpoint(address), QuestionOptions())
    with chat_server(good) as (address, _):
        assert write_questions([sample(0)], out, endpoint(address), QuestionOptions())["unanswered"] == 0


def test_a_page_of_html_says_so(tmp_path):
    page = b"<!doctype html><html>Log in</html>"
    with (
        chat_server(lambda body, _: page) as (address, _),
        pytest.raises(Unanswered, match="a page of HTML in place of JSON"),
    ):
        endpoint(address, tries=2)([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("field", ["content", "refusal"])
def test_half_a_character_in_one_reply_does_not_end_the_run(field, tmp_path):
    def answer(body, before):
        if number_of(body) != 1:
            return good(body)
        said = {"content": None, field: good(body).replace("red", "r\ud83ded")}
        return json.dumps({"choices": [{"message": said}]}).encode()

    out = tmp_path / "q.jsonl"
    with chat_server(answer) as (address, _):
        report = write_questions([sample(n) for n in range(3)], out, endpoint(address), QuestionOptions(("yes_no",)))
    assert report["kept"] == {"yes_no": 6 if field == "content" else 4}
    assert report["refused"] == (field == "refusal")
    assert ("r\ufffded" in out.read_text(encoding="utf-8")) == (field == "content")


def test_a_reply_is_cut_when_it_reaches_its_limit_without_an_end():
    assert is_cut([5, 6, 7], 3, eos_token_id=2)
    assert not is_cut([5, 6, 2], 3, eos_token_id=2)
    assert not is_cut([5, 6, 9], 3, eos_token_id=[2, 9])
    assert not is_cut([5, 6], 3, eos_token_id=2)


def test_retry_after_in_seconds_or_as_a_date():
    assert seconds_asked("7") == 7
    assert seconds_asked("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert seconds_asked("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9
    assert seconds_asked("soon") is None
    assert seconds_asked(None) is None


def test_limits_of_requests_and_tokens_per_minute():
    clock = [0.0]
    rate = RateLimit(60, 600, clock=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    starts = []
    for tokens in (0, 0, 50, 0):
        rate.take()
        starts.append(clock[0])
        rate.spend(tokens)
    assert starts == pytest.approx([0, 1, 2, 7])  # one per second; 50 tokens are five seconds of 600 per minute
    rate.pause(100)
    rate.take()
    assert clock[0] == pytest.approx(107)
    with pytest.raises(ValueError, match="must be positive"):
        RateLimit(requests_per_minute=0)


def test_however_many_samples_there_are_a_few_are_in_memory(tmp_path):
    """Samples are made one by one, and gone when they are done: counted, not timed."""
    import gc
    import weakref

    class Counted(dict):
        pass

    alive: weakref.WeakSet = weakref.WeakSet()
    most = [0]

    class Many:
        def __iter__(self):
            for number in range(400):
                one = Counted(sample(number))
                alive.add(one) if hasattr(Counted, "__hash__") and Counted.__hash__ else None
                yield one

    Counted.__hash__ = object.__hash__
    Counted.__eq__ = object.__eq__

    def ask(messages):
        most[0] = max(most[0], len(alive))
        return good({"messages": messages})

    report = write_questions(Many(), tmp_path / "q.jsonl", ask, QuestionOptions(concurrency=4))
    gc.collect()
    assert report["descriptions"] == 400
    assert most[0] <= 4 * 4
    assert len(alive) == 0


def command_of(rows, out, *words) -> list[str]:
    return ["questions", str(rows), "--type", "chat", "-o", str(out), "--model", "m", "--json", *words]


def test_shards_are_disjoint_and_complete(tmp_path):
    rows = tmp_path / "described.jsonl"
    rows.write_text("\n".join(json.dumps(sample(n)) for n in range(7)))
    with chat_server(good) as (address, seen):
        for number in (1, 2, 3):
            words = command_of(rows, tmp_path / "q.jsonl", "--base-url", address, "--shard", f"{number}/3")
            assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
        assert len(seen) == 14
    files = sorted(path.name for path in tmp_path.glob("q-*.jsonl"))
    assert files == [f"q-{number:05d}-of-00003.jsonl" for number in (1, 2, 3)]
    ids = [row["id"] for name in files for row in rows_of(tmp_path / name)]
    assert len(ids) == len(set(ids)) == 21


@pytest.mark.parametrize("shard", ["0/16", "17/16", "3", "3/0", "-1/4", "a/b", "1.5/4", "³/4"])
def test_wrong_shards_are_refused(shard, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(sample(0)))
    result = CliRunner().invoke(
        app, command_of(tmp_path / "d.jsonl", tmp_path / "q.jsonl", "--local", "x", "--shard", shard)
    )
    assert isinstance(result.exception, ValueError)
    assert "--shard" in str(result.exception)


def answer_batch(requests: list[dict], odd: dict[int, dict]) -> list[dict]:
    """What `vllm run-batch` or OpenAI would write."""
    lines = []
    for request in requests:
        number = number_of(request["body"])
        body = {
            "choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": good(request["body"])}}]
        }
        answer = {"response": {"status_code": 200, "request_id": "r", "body": body}, "error": None}
        lines.append({"id": f"b-{len(lines)}", "custom_id": request["custom_id"], **odd.get(number, answer)})
    return lines


def test_an_offline_batch_and_back(tmp_path, monkeypatch):
    from fusedvlm.data.generate import offline_batch

    monkeypatch.setattr(offline_batch, "MOST_REQUESTS", 5)
    rows, out = tmp_path / "described.jsonl", tmp_path / "q.jsonl"
    rows.write_text("\n".join(json.dumps(sample(n)) for n in range(4)))
    run = lambda *words: CliRunner().invoke(app, command_of(rows, out, *words))  # noqa: E731
    assert "8 requests in 2 files" in run("--batch-out", str(tmp_path / "batch")).stdout
    assert not out.exists()
    written = [row for path in sorted((tmp_path / "batch").glob("*.jsonl")) for row in rows_of(path)]
    assert len({row["custom_id"] for row in written}) == 8
    assert {(row["method"], row["url"], row["body"]["model"]) for row in written} == {
        ("POST", "/v1/chat/completions", "m")
    }
    odd = {
        1: {"response": {"status_code": 400, "body": {"error": {"message": "too long"}}}, "error": None},
        2: {"response": None, "error": {"code": "batch_expired", "message": "late"}},
        3: {"response": {"status_code": 200, "body": {"choices": [FINISHED]}}, "error": None},
    }
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answer_batch(written, odd))))
    result = run("--batch-in", str(tmp_path / "answers.jsonl"))
    assert "2 requests had no answer" in str(result.exception)
    report = json.loads(result.stdout)
    assert (report["refused"], report["cut"], report["unanswered"], report["kept"]["yes_no"]) == (2, 2, 2, 2)
    assert "2 requests in 1 files" in run("--batch-out", str(tmp_path / "rest")).stdout  # what expired, and no more
    foreign = [{**row, "custom_id": "x"} for row in answer_batch(written, {})]
    (tmp_path / "foreign.jsonl").write_text("\n".join(map(json.dumps, foreign)))
    assert "None of 8 answers belongs" in str(run("--batch-in", str(tmp_path / "foreign.jsonl")).exception)
    (tmp_path / "broken.jsonl").write_text("<html>")
    assert "line 1: not an answer of a batch" in str(run("--batch-in", str(tmp_path / "broken.jsonl")).exception)
    with chat_server(good) as (address, seen):  # the rest may be asked online
        assert run("--base-url", address).exit_code == 0
        assert len(seen) == 2


def test_routes_exclude_each_other(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(sample(0)))
    words = command_of(tmp_path / "d.jsonl", tmp_path / "q.jsonl", "--base-url", "http://x/v1", "--batch-out", "b")
    assert "or --model and --batch-out" in str(CliRunner().invoke(app, words).exception)

"""Re-read pages: a tiny nougat, a tiny embedder, a served reader, the four filters in place."""

import json

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertModel,
    DonutSwinConfig,
    DonutSwinModel,
    MBartConfig,
    MBartForCausalLM,
    NougatImageProcessor,
    NougatProcessor,
    NougatTokenizer,
    VisionEncoderDecoderModel,
    set_seed,
)
from typer.testing import CliRunner

from fusedvlm.data.cli import app
from fusedvlm.data.generate.answer_filters import PageLimits, cosine
from fusedvlm.data.generate.documents import NougatReader, SentenceEmbedder, read_documents
from fusedvlm.tests import tiny
from fusedvlm.tests.data.conftest import save_image
from fusedvlm.tests.data.server import chat_server

TEXT = " ".join(f"Line {number} of a page about nothing in particular." for number in range(12))


@pytest.fixture
def pages(tmp_path):
    """A file of three pages, one of whose images is damaged."""
    rows = []
    for number in range(3):
        image = save_image(tmp_path / f"{number}.png", seed=number)
        rows.append(
            {
                "id": f"p{number}",
                "image": image.name,
                "messages": [
                    {"role": "user", "content": "Recognize text in the image."},
                    {"role": "assistant", "content": TEXT},
                ],
            }
        )
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pages.jsonl"


@pytest.fixture(scope="module")
def nougat(tmp_path_factory):
    """A tiny random nougat."""
    folder = str(tmp_path_factory.mktemp("nougat"))
    set_seed(0)
    letters = {letter: 5 + place for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz .")}
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "[START_REF]": 4, **letters}
    tokenizer = NougatTokenizer(vocab=vocab, merges=[])
    size = {"height": 32, "width": 32}
    NougatProcessor(NougatImageProcessor(size=size, do_crop_margin=False), tokenizer).save_pretrained(folder)
    encoder = DonutSwinModel(
        DonutSwinConfig(image_size=[32, 32], patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    )
    decoder = MBartForCausalLM(
        MBartConfig(
            vocab_size=len(vocab), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
            is_decoder=True, add_cross_attention=True, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    model.config.pad_token_id = model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A tiny random sentence encoder."""
    folder = str(tmp_path_factory.mktemp("embedder"))
    set_seed(1)
    tokenizer = tiny.query_tokenizer()
    tokenizer.save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(folder)
    return folder


def test_a_local_reader_reads(nougat, tmp_path):
    reader = NougatReader(nougat, max_tokens=6)
    image = str(save_image(tmp_path / "a.png", (50, 70)))
    assert isinstance(reader(image), str)
    assert reader(image) == reader(image)
    assert "<s>" not in reader(image)


def test_embeddings_are_unit_vectors_that_ignore_padding(embedder):
    embed = SentenceEmbedder(embedder)
    alone, together = embed(["a short text"]), embed(["a short text", "a much longer text than the other one " * 5])
    assert torch.tensor(together).norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    assert cosine(*embed(["same", "same"])) == pytest.approx(1)


def test_mean_pooling_is_the_mean_over_real_tokens(embedder):
    embed = SentenceEmbedder(embedder)
    encoded = embed.tokenizer(["what is it"], return_tensors="pt")
    mean = embed.model(**encoded).last_hidden_state[0].mean(dim=0)
    assert embed(["what is it"])[0] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)


def samples(pages):
    from fusedvlm.data import load_source

    return list(load_source({"type": "chat", "path": str(pages)}))


def test_each_filter_drops_its_page(pages, tmp_path):
    rows = samples(pages)[:1]
    readings = {
        "kept": TEXT.replace("nothing", "something"),
        "too short": "A page.",
        "length too far from the original's": TEXT * 3,
        "repeats itself": "and so on " * 60,
        "not similar to the original": " ".join(reversed(TEXT.split())),
    }

    def embed(texts):
        return [[1.0, 0.0] if text.startswith("Line 0") else [0.0, 1.0] for text in texts]

    for reason, reading in readings.items():
        out = tmp_path / f"{reason}.jsonl"
        report = read_documents(rows, out, lambda image, text=reading: text, embed, PageLimits(), "test")
        if reason == "kept":
            assert report["kept"] == 1
            [row] = [json.loads(line) for line in out.read_text().splitlines()]
            assert row["messages"][-1]["content"][0]["text"] == reading
            assert row["messages"][0]["content"][1]["text"] == "Recognize text in the image."
        else:
            assert report["dropped"] == {reason: 1}, reason


def test_other_limits_do_not_read_again_and_repaired_images_are_read(pages, tmp_path):
    calls = []

    def read(image):
        calls.append(image)
        return TEXT

    out = tmp_path / "out.jsonl"
    report = read_documents(samples(pages), out, read, None, PageLimits(), "test")
    assert (report["kept"], report["dropped"], len(calls)) == (2, {"image cannot be read": 1}, 2)
    strict = read_documents(samples(pages), out, read, None, PageLimits(min_words=1000), "test")
    assert (strict["dropped"]["too short"], len(calls)) == (2, 2)
    save_image(tmp_path / "2.png")
    assert read_documents(samples(pages), out, read, None, PageLimits(), "test")["kept"] == 3
    assert len(calls) == 3
    with pytest.raises(ValueError, match="no pages"):
        read_documents([{"images": [], "messages": []}], out, read, None, PageLimits(), "test")


def test_command_with_a_local_nougat(pages, nougat, embedder, tmp_path):
    command = ["documents", str(pages), "--type", "chat", "-o", str(tmp_path / "out.jsonl"), "--local", nougat]
    result = CliRunner().invoke(app, [*command, "--embedding-model", embedder, "--max-tokens", "6", "--json"])
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert report["pages"] == 3
    assert report["dropped"] == {"image cannot be read": 1, "too short": 2}
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl.journal").read_text().splitlines()]
    assert sorted(entry["id"] for entry in entries) == ["p0", "p1", "p2"]


def test_command_with_an_endpoint(pages, embedder, tmp_path):
    def answer(body, before):
        assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        return 429 if before == 0 else TEXT

    with chat_server(answer) as (address, _):
        command = ["documents", str(pages), "--type", "chat", "-o", str(tmp_path / "out.jsonl"), "--base-url", address]
        result = CliRunner().invoke(app, [*command, "--model", "m", "--embedding-model", embedder])
    assert result.exit_code == 0, result.exception
    assert "kept 2 of 3 pages" in result.stdout


def test_an_offline_batch_of_pages_and_back(pages, embedder, tmp_path):
    """The page that cannot be opened is in no batch, and does not keep the work from being finished."""
    out, batch = tmp_path / "out.jsonl", tmp_path / "batch"
    words = ["documents", str(pages), "--type", "chat", "-o", str(out), "--model", "m", "--embedding-model", embedder]
    run = lambda *more: CliRunner().invoke(app, [*words, *more])  # noqa: E731
    assert "2 requests in 1 files" in run("--batch-out", str(batch)).stdout
    requests = [json.loads(line) for line in (batch / "requests-00000.jsonl").read_text().splitlines()]
    assert all(request["body"]["messages"][0]["content"][0]["type"] == "image_url" for request in requests)
    body = {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": TEXT}}]}
    answers = [
        {"custom_id": requests[0]["custom_id"], "response": {"status_code": 200, "body": body}, "error": None},
        {"custom_id": requests[1]["custom_id"], "response": None, "error": {"code": "batch_expired"}},
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    first = run("--batch-in", str(tmp_path / "answers.jsonl"), "--json")
    assert "1 requests had no answer" in str(first.exception)
    report = json.loads(first.stdout)
    assert (report["kept"], report["unanswered"], report["dropped"]) == (1, 1, {"image cannot be read": 1})
    assert "1 requests in 1 files" in run("--batch-out", str(tmp_path / "rest")).stdout
    answers[1] |= answers[0] | {"custom_id": requests[1]["custom_id"]}
    (tmp_path / "rest.jsonl").write_text(json.dumps(answers[1]))
    last = run("--batch-in", str(tmp_path / "rest.jsonl"))
    assert last.exit_code == 0, last.exception
    assert "kept 2 of 3 pages" in last.stdout
    assert "image cannot be read" in last.stdout
    similarities = [json.loads(line).get("similarity") for line in out.with_name("out.jsonl.journal").open()]
    assert similarities.count(None) == 2, "readings of a batch are compared when they are collected"
    assert len(similarities) == 4


def test_pages_converted_by_several_processes_are_the_same_work(pages, tmp_path):
    """`num_proc` shares the files of a source; a run with it goes on where one without it stopped."""
    rows = pages.read_text().splitlines()
    files = [tmp_path / f"part-{number}.jsonl" for number in range(len(rows))]
    for file, row in zip(files, rows, strict=True):
        file.write_text(row)
    spec = {"type": "chat", "path": [str(file) for file in files], "image_folder": str(tmp_path)}
    for number, extra in enumerate(({}, {"num_proc": 2})):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump({"sources": [{**spec, **extra}]}))
    with chat_server(lambda body, before: TEXT) as (address, seen):
        for number in (1, 0, 1):
            words = ["documents", str(tmp_path / f"{number}.yaml"), "-o", str(tmp_path / "out.jsonl"), "--model", "m"]
            result = CliRunner().invoke(app, [*words, "--base-url", address, "--embedding-model", "none"])
            assert result.exit_code == 0, result.exception
            assert "kept 2 of 3 pages" in result.stdout
            assert len(seen) == 2

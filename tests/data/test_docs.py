"""docs/data.md: its commands in order, in its own folder layout, with tiny data, a served LLM and a tiny nougat."""

import json
import re
import shlex
import subprocess
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusedvlm.data.cli import app
from fusedvlm.tests.data.conftest import llava_row, save_image
from fusedvlm.tests.data.server import chat_server
from fusedvlm.tests.data.test_documents import embedder, nougat  # noqa: F401
from fusedvlm.tests.data.test_questions import good
from fusedvlm.tests.pages import Page, blocks_of, names_of

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = [block for block in blocks_of(PAGE, r"\w+") if block[0] in ("yaml", "python", "bash")]


def zipped(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.with_suffix(".json").name, json.dumps(rows))


def svit_item(number: int, answers: list[str]) -> dict:
    content = [[{"from": "user", "value": "What?"}, {"from": "gpt", "value": answer}] for answer in answers]
    return {"image_id": number, "conversations": [{"content": turns} for turns in content]}


def lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page_row(image: str, text: str) -> dict:
    return {
        "image": [image],
        "messages": [{"role": "user", "content": "<|image|>Read it."}, {"role": "assistant", "content": text}],
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The folder of the page's first section, and where we are."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("page"))
        write_raw()
        yield


def write_raw() -> None:
    images = Path("raw/images")
    names = ["coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/3.jpg", "textvqa/train_images/4.jpg"]
    for name in [*names, "vg/VG_100K/11.jpg", "vg/VG_100K_2/22.jpg"]:
        save_image(images / name)
    Path("raw/llava").mkdir()
    rows = [llava_row(number, name) for number, name in enumerate([*names, None])]
    Path("raw/llava/llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    described = [svit_item(number, [f"Picture {number} shows " + "several things " * 20]) for number in (11, 22)]
    zipped(Path("raw/svit/data/detail_description.zip"), described)
    for name in ("conversation", "complex_reasoning"):
        zipped(Path(f"raw/svit/data/{name}.zip"), [svit_item(11, [f"Answer {turn}." for turn in range(7)])])
    zipped(
        Path("raw/svit/data/referring_qa.zip"),
        [svit_item(22, ["<st>It<ed> [0.1, 0.2, 0.5, 0.9].", "[2.0, 0.1, 0.1, 1]"])],
    )
    for folder, name in (("DocDownstream-1.0", "train.jsonl"), ("DocStruct4M", "struct_aware_parse.jsonl")):
        save_image(Path("raw", folder, "imgs/CCpdf/pages/a.png"))
        lines(
            Path("raw", folder, name),
            [page_row("./imgs/CCpdf/pages/a.png", "Some words."), page_row("./imgs/b.png", "x")],
        )
    save_image(Path("raw/DocDownstream-1.0/imgs/b.png"))


def run_line(line: str, address: str, models: dict[str, str]) -> None:
    line = line.replace("http://localhost:8000/v1", address)
    for name, folder in models.items():
        line = line.replace(name, folder)
    if line.startswith("grep "):
        subprocess.run(line, shell=True, check=True)
        return
    words = shlex.split(line)
    assert words[:2] == ["fusedvlm", "data"], line
    result = CliRunner().invoke(app, words[2:])
    assert result.exit_code == 0, (line, result.exception)


@pytest.fixture(scope="module")
def page(raw, nougat, embedder):  # noqa: F811
    """The nougat of the page reads nonsense here, so no page is kept; nothing later needs one."""
    from fusedvlm.data.generate import documents

    original = documents.SentenceEmbedder
    namespace: dict = {}
    with pytest.MonkeyPatch.context() as monkeypatch, chat_server(good) as (address, _):
        monkeypatch.setattr(documents, "SentenceEmbedder", lambda model, **kwargs: original(embedder, **kwargs))

        def run_block(kind: str, text: str) -> None:
            if kind == "yaml":
                Path(re.match(r"# (\S+)", text)[1]).write_text(text)
            elif kind == "python":
                exec(compile(text, "docs/data.md", "exec"), namespace)
            else:
                for line in text.strip().splitlines():
                    run_line(line, address, {"facebook/nougat-base": f"{nougat} --max-tokens 4"})

        page = Page(BLOCKS, run_block)
        page.namespace = namespace
        yield page


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=names_of(BLOCKS))
def test_block(page, number):
    page.run(number)


def test_the_page_leads_from_raw_data_to_shards(page):
    page.finish()
    assert {sample["source"] for sample in page.namespace["dataset"]} == {
        "llava",
        "svit",
        "referring",
        "documents",
        "questions",
    }
    manifest = json.loads(Path("manifest.json").read_text())
    assert [source["samples"] for source in manifest["sources"]] == [5, 4, 1, 2, 6]
    assert manifest["sources"][2]["dropped_rows"] == 1
    assert list(Path("shards").iterdir())


def test_every_key_of_a_source_is_on_the_page():
    from dataclasses import fields

    from fusedvlm.data import SourceSpec

    table = PAGE.read_text()
    assert [entry.name for entry in fields(SourceSpec) if f"`{entry.name}`" not in table] == []

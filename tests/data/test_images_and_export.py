"""Checking images, dropping, converting, manifests: through the command line, as a user would."""

import hashlib
import json
import subprocess
from pathlib import Path

import datasets
import pytest
import yaml
from typer.testing import CliRunner

from fusedvlm.data import load_source
from fusedvlm.data.cli import app
from fusedvlm.data.prepare.export import write_shards
from fusedvlm.data.prepare.image_check import check_images
from fusedvlm.tests import fork_server
from fusedvlm.tests.data.conftest import save_image

run = CliRunner().invoke


@pytest.fixture
def section(llava, docdownstream, tmp_path):
    """A YAML with two sources."""
    file, folder = llava
    document = {
        "data": {
            "sources": [
                {"type": "llava", "path": str(file), "image_folder": str(folder), "name": "llava"},
                {"type": "docdownstream", "path": str(docdownstream), "name": "docs", "license": "see the card"},
            ],
            "seed": 3,
        }
    }
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_good_images_pass(section):
    result = run(app, ["check", str(section), "--json"])
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert (report["samples"], report["images"], report["missing"], report["corrupt"]) == (8, 6, [], [])
    assert report["by_source"]["docs"]["samples"] == 3


def damage(llava, docdownstream) -> None:
    """One missing, one cut short, one that is no image."""
    _, folder = llava
    (folder / "coco/train2017/000000000001.jpg").unlink()
    cut = folder / "ocr_vqa/images/2.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (docdownstream.parent / "imgs/DUE_Benchmark/DocVQA/pngs/1.png").write_text("<html>404</html>")


def test_bad_images_are_named_with_their_reason(section, llava, docdownstream):
    damage(llava, docdownstream)
    result = run(app, ["check", str(section)])
    assert isinstance(result.exception, ValueError)  # the main program turns it into exit code 2
    message = str(result.exception)
    assert "1 images are missing and 2 cannot be opened, of 6" in message
    assert "000000000001.jpg (no such file)" in message
    assert "2.jpg (damaged or truncated image" in message
    assert "1.png (not an image" in message
    assert "drop their 3 samples" in message


def test_dropping_says_how_many_from_where_and_leaves_a_source(section, llava, docdownstream, tmp_path):
    damage(llava, docdownstream)
    result = run(app, ["check", str(section), "--drop", str(tmp_path / "kept.jsonl")])
    assert result.exit_code == 0
    assert "llava: dropped 2 of 5 samples" in result.stderr
    assert "docs: dropped 1 of 3 samples" in result.stderr
    kept = load_source({"type": "chat", "path": str(tmp_path / "kept.jsonl")})
    assert len(kept) == 5
    assert not check_images([kept], show_progress=False).bad
    assert run(app, ["check", str(section), "--drop", "x.json"]).exit_code != 0


def test_an_image_of_many_samples_is_opened_once(tmp_path, monkeypatch):
    from fusedvlm.data.prepare import image_check as images

    save_image(tmp_path / "a.png")
    rows = [{"image": "a.png", "messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}] * 30
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    opened = []
    monkeypatch.setattr(images, "BLOCK", 7)
    monkeypatch.setattr(images, "load_image", opened.append)
    report = check_images([load_source({"type": "chat", "path": str(tmp_path / "rows.jsonl")})], show_progress=False)
    assert len(opened) == report.images == 1
    (tmp_path / "a.png").unlink()
    [entry] = check_images(
        [load_source({"type": "chat", "path": str(tmp_path / "rows.jsonl")})], show_progress=False
    ).missing
    assert entry["samples"] == 30


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
def test_shards_hold_the_same_samples(section, tmp_path, file_format):
    out = tmp_path / "shards"
    result = run(
        app, ["convert", str(section), "-o", str(out), "--format", file_format, "--rows-per-shard", "3", "--json"]
    )
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["shards"] == len(list(out.iterdir())) == 3
    ending = {"parquet": "parquet", "webdataset": "tar"}[file_format]
    back = list(load_source({"type": file_format, "path": str(out / f"*.{ending}")}))
    shown = run(app, ["show", str(section), "-n", "8", "--json"])
    wanted = json.loads(shown.stdout)["samples"]
    assert [sample["id"] for sample in back] == [sample["id"] for sample in wanted]
    assert [sample["messages"] for sample in back] == [sample["messages"] for sample in wanted]
    for sample, original in zip(back, wanted, strict=True):
        assert sample["images"] == [Path(path).read_bytes() for path in original["images"]]


def test_parquet_shards_are_a_dataset_for_anybody(section, tmp_path):
    write_shards(yaml.safe_load(section.read_text()), tmp_path / "shards")
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "shards/*.parquet"), split="train")
    with_image = next(row for row in table if row["images"])
    assert with_image["images"][0].size[1] == 30


def test_convert_refuses_to_overwrite_and_leaves_nothing_half_done(section, llava, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        write_shards(yaml.safe_load(section.read_text()), tmp_path / "full")
    (llava[1] / "ocr_vqa/images/2.jpg").unlink()
    with pytest.raises(ValueError, match=r"2\.jpg: cannot be read"):
        write_shards(yaml.safe_load(section.read_text()), tmp_path / "half")
    assert not list(tmp_path.glob("*half*")) + list(tmp_path.glob(".*half*"))


def test_streams_without_weights_are_written_once(section, tmp_path):
    document = yaml.safe_load(section.read_text())
    for source in document["data"]["sources"]:
        source["streaming"] = True
    assert write_shards(document, tmp_path / "shards")["samples"] == 8


def test_manifest(section, llava, tmp_path):
    out = tmp_path / "manifest.json"
    result = run(app, ["manifest", str(section), "--license", "llava=CC BY 4.0", "-o", str(out)])
    assert result.exit_code == 0, result.exception
    document = json.loads(out.read_text())
    first, second = document["sources"]
    assert first["files"][0]["sha256"] == hashlib.sha256(llava[0].read_bytes()).hexdigest()
    assert (first["samples"], first["images"], first["answers"], first["license"]) == (5, 3, 7, "CC BY 4.0")
    assert second["license"] == "see the card"
    assert document["samples"] == 8
    for wrong, message in (("nobody=MIT", "No source nobody"), ("llava", "NAME=TEXT")):
        result = run(app, ["manifest", str(section), "--license", wrong])
        assert message in str(result.exception)


def test_data_files_need_a_type(llava):
    file, folder = llava
    assert "--type" in str(run(app, ["show", str(file)]).exception)
    shown = run(app, ["show", str(file), "--type", "llava", "--images", str(folder)])
    assert "5 samples in an epoch" in shown.stdout
    assert "user: <image> Question" in shown.stdout
    assert "--images" in str(run(app, ["show", "data.yaml", "--type", "llava"]).exception)
    assert "no such file" in str(run(app, ["show", "data.yaml"]).exception)


def test_exit_codes(section, llava):
    """The command itself: 2 and one line for bad images, nothing on standard output but the counts."""
    (llava[1] / "ocr_vqa/images/2.jpg").write_bytes(b"")
    command = [fork_server.executable("fusedvlm"), "data", "check", str(section)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "2.jpg (the file is empty.)" in result.stderr.strip().splitlines()[-1]
    assert result.stdout.startswith("llava: 5 samples, 3 images, 1 corrupt, 1 affected")

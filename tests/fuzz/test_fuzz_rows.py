"""JSON, JSON Lines and odd rows of every layout, read as a stream: samples that train, or one line with file and row."""

import json
from pathlib import Path

import pytest

from fusedvlm.data import load_source, normalize_sample
from fusedvlm.tests.fuzz.harness import LONGEST, Target, explore, json_cases, judge

LAYOUTS = ("llava", "svit", "docdownstream", "chat")


def layout_of(case: bytes) -> str:
    """The layout a case is read as: the one it looks like, so that damaged rows are not all refused at the door."""
    text = case.decode("utf-8", errors="replace")
    if '"image_id"' in text:
        return "svit"
    if '"conversations"' in text:
        return "llava"
    return "docdownstream" if "<|image|>" in text else "chat"


def read_rows(case: bytes, folder: Path) -> None:
    """Every row is a sample that the collator takes; with "drop" the same ones, without the bad."""
    path = folder / "rows.json"
    path.write_bytes(case)
    spec = {"type": layout_of(case), "path": str(path), "streaming": True}
    kept = list(load_source({**spec, "bad_rows": "drop"}))
    for sample in kept:
        check_sample(sample)
    strict = list(load_source(spec))  # raises where a row was dropped
    assert strict == kept


def check_sample(sample: dict) -> None:
    """Who speaks alternates, nothing is empty, every image has its place, all text can be written down again."""
    normal = normalize_sample(sample)
    roles = [message["role"] for message in normal["messages"]]
    dialogue = roles[1:] if roles[0] == "system" else roles
    assert dialogue != []
    assert dialogue == ["user", "assistant"] * (len(dialogue) // 2), roles
    shown = 0
    for message in normal["messages"]:
        for part in message["content"]:
            assert part["type"] in ("image", "text")
            shown += part["type"] == "image"
            assert part["type"] == "image" or isinstance(part["text"], str)
    assert shown == len(normal["images"])
    assert isinstance(sample["id"], str)
    json.dumps(sample["messages"], ensure_ascii=False).encode("utf-8")
    for image in sample["images"]:
        assert isinstance(image, (str, bytes)), type(image)
        assert not str(image).startswith("{"), f"a mapping became a file name: {image!r}"


TARGET = Target("rows", read_rows, ("rows.json",), json_cases(broken=True))


@pytest.mark.parametrize("path", TARGET.corpus(), ids=lambda path: path.name)
def test_the_corpus(path, tmp_path):
    kind = judge(TARGET, path.read_bytes(), tmp_path)
    assert kind == "clean" or not path.name.startswith("seed-")


@pytest.mark.timeout(0)
def test_damaged_rows(tmp_path, capfd):
    seen = explore(TARGET, tmp_path)
    assert seen["clean"]
    assert seen["refused"]
    said = capfd.readouterr().err.splitlines()
    assert not [line for line in said if "rows.json" in line and len(line) > LONGEST + 100]

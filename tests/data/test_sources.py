"""Sources: every layout to the one format, sized or streamed alike; bad rows named; nothing opened before its time."""

import gzip
import io
import json
import tarfile
import zipfile
from fractions import Fraction

import datasets
import pytest
from PIL import Image

from fusedvlm.data import build_dataset, load_source, normalize_sample, read_spec
from fusedvlm.data.boxes import find_boxes
from fusedvlm.data.mixing.mixture import Mixture
from fusedvlm.data.mixing.streaming import StreamingMixture
from fusedvlm.tests.data.conftest import llava_row, save_image


def both_ways(**spec) -> list[dict]:
    """The samples, after making sure that streaming gives the same ones."""
    sized = list(load_source(spec))
    assert list(load_source({**spec, "streaming": True})) == sized
    for sample in sized:
        normalize_sample(sample)
    return sized


def texts(sample) -> list[str]:
    return [part["text"] for message in sample["messages"] for part in message["content"] if part["type"] == "text"]


def test_llava(llava):
    file, folder = llava
    samples = both_ways(type="llava", path=str(file), image_folder=str(folder))
    assert len(samples) == 5
    assert samples[0] == {
        "id": "000000000000",
        "source": "llava:llava_v1_5_mix665k.json",
        "images": [str(folder / "coco/train2017/000000000001.jpg")],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Question 0 about 0?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Answer 0 about 0."}]},
        ],
    }
    assert len(samples[1]["messages"]) == 4
    assert samples[3]["images"] == []


def test_llava_images_after_the_question_and_answers_before_it(tmp_path):
    row = llava_row(1, "a.jpg")
    row["conversations"][0]["value"] = "What is this?\n<image>"
    row["conversations"].insert(0, {"from": "gpt", "value": "Hello, how can I help?"})
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    [sample] = both_ways(type="llava", path=str(tmp_path / "rows.json"))
    assert [part["type"] for part in sample["messages"][0]["content"]] == ["text", "image"]
    assert sample["images"] == [str(tmp_path / "a.jpg")]  # relative to the file when no folder is given
    assert len(sample["messages"]) == 2


def test_svit(svit):
    detail, referring, folder = svit
    samples = both_ways(type="svit", path=str(detail), image_folder=str(folder))
    assert [sample["images"][0] for sample in samples] == [
        str(folder / "VG_100K/11.jpg"),
        str(folder / "VG_100K_2/22.jpg"),
    ]
    assert [sample["id"] for sample in samples] == ["11-0", "22-0"]
    assert samples[0]["messages"][0]["content"][0] == {"type": "image"}
    separate = both_ways(type="svit", path=str(referring), image_folder=str(folder))
    joined = both_ways(type="svit", path=str(referring), image_folder=str(folder), turns_per_sample=2)
    assert [len(sample["messages"]) for sample in separate] == [2, 2, 2]
    assert [len(sample["messages"]) for sample in joined] == [4, 2]


def test_svit_boxes_follow_the_padding(svit):
    _, referring, folder = svit
    spec = {"type": "svit", "path": str(referring), "image_folder": str(folder)}
    answers = {boxes: texts(both_ways(**spec, boxes=boxes)[0])[1] for boxes in ("keep", "tags", "square")}
    assert "[0.1, 0.0, 0.5, 1.0]" in answers["keep"]
    assert "<bbox>100,0,500,999</bbox>" in answers["tags"]
    assert "<bbox>100,125,500,874</bbox>" in answers["square"]  # 64 x 48 on a square of 64: 8 rows above
    assert find_boxes(answers["square"])[0].left == Fraction(100, 999)


def test_docdownstream(docdownstream):
    samples = both_ways(type="docdownstream", path=str(docdownstream))
    assert texts(samples[1]) == ["What is item 1?", "number 1"]
    assert samples[1]["images"] == [str(docdownstream.parent / "imgs/DUE_Benchmark/DocVQA/pngs/1.png")]


def chat_rows(image) -> list[dict]:
    ask = {"role": "user", "content": "What is it?"}
    answer = {"role": "assistant", "content": "A cat."}
    shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    linked = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "?"}],
    }
    return [
        {"image": image, "messages": [ask, answer]},
        {"images": [image], "messages": [shown, answer]},
        {"messages": [linked, answer]},
        {"messages": [{"role": "system", "content": "Be brief."}, ask, answer]},
        {"images": [image], "prompt": [shown], "completion": [answer]},
        {"image": image, "conversations": llava_row(1, "x")["conversations"]},
        {"images": [image, image], "messages": [{"role": "user", "content": "<image><image>Same?"}, answer]},
    ]


def test_chat_layouts(tmp_path):
    image = str(save_image(tmp_path / "cat.png"))
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in chat_rows(image)))
    samples = both_ways(type="chat", path=str(tmp_path / "chat.jsonl"))
    assert [len(sample["images"]) for sample in samples] == [1, 1, 1, 0, 1, 1, 2]
    assert {image for sample in samples for image in sample["images"]} == {image}
    assert samples[0]["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert samples[0]["id"].endswith("row 1")


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_of_datasets_keep_their_images_undecoded(tmp_path, kind):
    """TRL's vision format with embedded images: parquet shards, and a folder of `save_to_disk`."""
    image = save_image(tmp_path / "cat.png")
    rows = [{"images": [{"bytes": image.read_bytes(), "path": None}], "messages": chat_rows("")[0]["messages"]}] * 3
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    table = datasets.Dataset.from_list(rows, features=features)
    if kind == "parquet":
        table.to_parquet(str(tmp_path / "a.parquet"))
        samples = both_ways(type="parquet", path=str(tmp_path / "*.parquet"))
    else:
        table.save_to_disk(str(tmp_path / "saved"))
        samples = both_ways(type="chat", path=str(tmp_path / "saved"))
    assert len(samples) == 3
    assert samples[0]["images"] == [image.read_bytes()]


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_webdataset(tmp_path):
    """One image, two images, none: rows need not be alike."""
    pictures = [save_image(tmp_path / f"{number}.jpg", seed=number).read_bytes() for number in range(3)]
    one, two, none = llava_row(1, "ignored.jpg"), chat_rows("")[6], llava_row(3)
    two = {"messages": two["messages"]}
    write_tar(tmp_path / "s-0.tar", {"a/1.json": json.dumps(one).encode(), "a/1.jpg": pictures[0]})
    write_tar(
        tmp_path / "s-1.tar",
        {
            "2.10.jpg": pictures[2],
            "2.9.jpg": pictures[1],
            "2.json": json.dumps(two).encode(),
            "3.json": json.dumps(none).encode(),
        },
    )
    samples = both_ways(type="webdataset", path=str(tmp_path / "s-*.tar"))
    assert [sample["images"] for sample in samples] == [[pictures[0]], [pictures[1], pictures[2]], []]
    assert [sample["id"] for sample in samples] == ["000000000001", "2", "000000000003"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1}], r"rows.json, row 1: field 'conversations' must be a list, got NoneType; fields here: id"),
        (
            [llava_row(1), {"conversations": [{"from": "robot", "value": "x"}]}],
            r"row 2: field 'from' of a turn is 'robot'",
        ),
        ([{"conversations": [{"from": "human", "value": 5}]}], r"field 'value' of a turn must be text, got int"),
        ([{"conversations": [{"from": "human", "value": "a"}]}], "the last question has no answer"),
        (
            [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}],
            r"message 1 \(assistant\) is empty",
        ),
        ([{"conversations": [{"from": "human", "value": "a"}] * 2}], "turns alternate"),
        ([{**llava_row(1, "a.jpg"), "image": ["a.jpg", "b.jpg"]}], "2 images, but 1 places"),
        ([{**llava_row(1, "a.jpg"), "image": None}], "0 images, but 1 places"),
        ([{"conversations": []}], "no messages"),
        ([["a"]], "must be an object"),
    ],
)
def test_bad_rows_are_named_and_only_dropped_when_told(tmp_path, rows, message, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([*rows, llava_row(9)]))
    spec = {"type": "llava", "path": str(tmp_path / "rows.json")}
    with pytest.raises(ValueError, match=message):
        load_source(spec)
    with pytest.raises(ValueError, match=message):
        list(load_source({**spec, "streaming": True}))
    kept = load_source({**spec, "bad_rows": "drop"})
    assert [sample["id"] for sample in kept] == [row["id"] for row in (*rows[:-1], llava_row(9))]
    assert kept.dropped == 1
    assert f"1 of {len(rows) + 1} rows" in capsys.readouterr().err
    assert list(load_source({**spec, "bad_rows": "drop", "streaming": True})) == list(kept)
    assert "dropped 1 malformed" in capsys.readouterr().err


def test_bad_rows_of_tables_are_named(tmp_path):
    rows = [
        {"messages": [{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}]}
        for role in ("user", "tool")
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "t.parquet"))
    spec = {"type": "parquet", "path": str(tmp_path / "t.parquet")}
    with pytest.raises(ValueError, match=r"t.parquet, row 2: message 0 has role 'tool'"):
        load_source(spec)
    with pytest.raises(ValueError, match=r"t.parquet, row 2: message 0 has role 'tool'"):
        list(load_source({**spec, "streaming": True}))
    assert len(load_source({**spec, "bad_rows": "drop"})) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("   \n ", "empty"),
        ('[{"a": 1}', "row 2: not JSON: parse error: premature EOF"),
        ('[{"a": 1} {"b": 2}]', "row 2: not JSON: parse error: after array element"),
        ('[{"a": 1}] [', "after the closing bracket of the array: not JSON"),
        ('[{"a": "unterm', "row 1: not JSON"),
        ('{"conversations": [}', "row 1: not JSON"),
        ('{"id": 1}\n{"id": nonsense}', "row 2: not JSON"),
    ],
)
@pytest.mark.parametrize("depth", [0, 4], ids=["near", "far"])
def test_files_that_are_not_json(tmp_path, content, message, depth):
    folder = tmp_path.joinpath(*["a-long-name-of-a-folder-with-the-data-of-a-day" for _ in range(depth)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_source({"type": "llava", "path": str(folder / "rows.json")})
    assert "rows.json" in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_json_is_read_in_pieces_whatever_lies_on_their_edges(tmp_path, monkeypatch):
    from fusedvlm.data.sources import json_rows

    rows = [{"text": 'ü"\\n]} ' * number, "number": number, "deep": [{"a": [number]}]} for number in range(12)] + [
        7,
        "x",
        None,
    ]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("packed.json", json.dumps(rows))
    for chunk in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        for name in ("array.json", "lines.jsonl", "packed.zip"):
            assert [row for _, row in json_rows.read_json_rows(str(tmp_path / name))] == rows


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "rows.json"
    for count in (2, 3):
        file.write_text(json.dumps([llava_row(number) for number in range(count)]))
        assert len(load_source({"type": "llava", "path": str(file)})) == count


def test_fraction_is_seeded(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([llava_row(number) for number in range(400)]))
    spec = {"type": "llava", "path": str(file)}

    def chosen(**extra):
        return [sample["id"] for sample in load_source({**spec, **extra})]

    tenth = chosen(fraction=0.1)
    assert len(tenth) == 40
    assert tenth == sorted(tenth) == chosen(fraction=0.1)
    assert tenth != chosen(fraction=0.1, seed=1)
    streamed = chosen(fraction=0.1, streaming=True)
    assert 20 < len(streamed) < 65
    assert streamed == chosen(fraction=0.1, streaming=True) != chosen(fraction=0.1, streaming=True, seed=1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "llava"}, "path is missing"),
        ({"type": "llama", "path": "x.json"}, "type='llama' must be one of llava, svit"),
        ({"type": "llava", "path": "x.json", "wieght": 1}, "x.json: unknown key 'wieght'"),
        ({"type": "llava", "path": "/nowhere/x.json"}, "/nowhere/x.json: no such file"),
        ({"type": "llava", "path": "x.json", "fraction": 0}, "fraction=0"),
        (
            {"type": "llava", "path": "x.json", "boxes": "round"},
            "boxes must be 'keep', 'tags' or 'square', not 'round'",
        ),
        ({"type": "llava", "path": "x.json", "fraction": "0.1"}, "fraction must be a number, not '0.1'"),
        ({"type": "llava", "path": "x.json", "streaming": "false"}, "streaming must be true or false, not 'false'"),
        ({"type": "llava", "path": "x.json", "seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"type": "llava", "path": [1]}, "path must be text, not"),
        ({"type": "llava", "path": "x.json", "turns_per_sample": 2}, "turns_per_sample"),
        ("llava", "mapping with type and path"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        load_source(spec)


def test_build_dataset(llava, docdownstream):
    file, folder = llava
    sources = [
        {"type": "llava", "path": str(file), "image_folder": str(folder), "weight": 3.0},
        {"type": "docdownstream", "path": str(docdownstream), "weight": 1.0},
    ]
    mixture = build_dataset({"sources": sources, "seed": 5})
    assert isinstance(mixture, Mixture)
    assert len(mixture) == 12
    assert {sample["source"] for sample in mixture} == {"llava:llava_v1_5_mix665k.json", "docdownstream:train.jsonl"}
    assert [sample["id"] for sample in build_dataset({"data": {"sources": sources, "seed": 5}})] == [
        sample["id"] for sample in mixture
    ]
    assert len(build_dataset(sources[0])) == 5
    assert len(build_dataset([{**source, "weight": None} for source in sources])) == 8
    endless = build_dataset([{**source, "streaming": True} for source in sources])
    assert isinstance(endless, StreamingMixture)
    assert len([sample for sample, _ in zip(endless, range(50), strict=False)]) == 50


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"sources": []}, "needs a list 'sources:'"),
        ({"sources": [{"type": "llava", "path": "a"}], "sed": 1}, "Unknown keys sed"),
        ([{"type": "llava", "path": "a", "weight": 1}, {"type": "svit", "path": "b"}], "Only llava:a has a weight"),
        (None, "needs a list"),
    ],
)
def test_wrong_data_sections(spec, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(spec)


def test_streams_continue_after_a_state(tmp_path):
    """JSON, parquet and tar sources in one mixture, stopped and continued everywhere."""
    rows = [llava_row(number) for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    table = [
        {"id": f"p{n}", "messages": [{"role": r, "content": str(n)} for r in ("user", "assistant")]} for n in range(7)
    ]
    datasets.Dataset.from_list(table).to_parquet(str(tmp_path / "t.parquet"))
    write_tar(tmp_path / "s.tar", {f"{n}.json": json.dumps(llava_row(100 + n)).encode() for n in range(6)})
    spec = {
        "sources": [
            {"type": "llava", "path": str(tmp_path / "rows.jsonl"), "streaming": True},
            {"type": "parquet", "path": str(tmp_path / "t.parquet"), "streaming": True},
            {"type": "webdataset", "path": str(tmp_path / "s.tar"), "streaming": True},
        ],
        "shuffle_block": 4,
        "stop": "all_exhausted",
    }
    expected = [sample["id"] for sample in build_dataset(spec)]
    assert len(set(expected)) == 22
    for taken in range(len(expected) + 1):
        first = build_dataset(spec)
        begin = [sample["id"] for _, sample in zip(range(taken), first, strict=False)]
        second = build_dataset(spec)
        second.load_state_dict(first.state_dict())
        assert begin + [sample["id"] for sample in second] == expected


def test_collator_takes_the_samples(processor, svit, llava, tmp_path):
    from fusedvlm.trainers import ConversationCollator

    file, folder = llava
    samples = list(load_source({"type": "llava", "path": str(file), "image_folder": str(folder)}))
    png = io.BytesIO()
    Image.new("RGB", (20, 30)).save(png, "PNG")
    samples.append({**samples[0], "images": [png.getvalue()]})
    batch = ConversationCollator(processor)(samples)
    assert batch["input_ids"].shape[0] == 6
    assert (batch["labels"] != -100).any(dim=1).all()


def test_recipes_are_data_sections_too(llava, tmp_path):
    file, folder = llava
    path = tmp_path / "recipe.yaml"
    source = f"{{type: llava, path: {file}, image_folder: {folder}, fraction: 0.5}}"
    path.write_text(
        f"stage: variants\ndata:\n  sources: [{source}]\n  mixture_seed: 7\n  fraction: 0.8\n  fraction_seed: 3\n"
        "  eval_sources: []\nmodel: {}\n"
    )
    assert read_spec(str(path)) == {
        "sources": [
            {"type": "llava", "path": str(file), "image_folder": str(folder), "fraction": 0.4, "seed": 3},
        ],
        "seed": 7,
    }
    assert len(build_dataset(read_spec(str(path)))) == 2
    path.write_text("{")
    with pytest.raises(ValueError, match="not YAML"):
        read_spec(str(path))


def test_a_bad_box_is_no_fault_of_its_neighbors(svit, tmp_path):
    _, referring, folder = svit
    rows = json.loads(referring.read_text())
    rows[0]["conversations"][1]["content"][1]["value"] = "There [0.9, 0.1, 0.2, 0.3]."
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(rows))
    spec = {"type": "svit", "path": str(path), "image_folder": str(folder), "boxes": "square"}
    with pytest.raises(ValueError, match=r"row 1, sample 11-1: Box \[0.9, 0.1, 0.2, 0.3\] is not left <= right"):
        load_source(spec)
    assert [sample["id"] for sample in load_source({**spec, "bad_rows": "drop"})] == ["11-0", "11-2"]


def test_archives_that_hold_several_files_or_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in ("a.json", "b.json", "__MACOSX/a.json", "readme.txt"):
            archive.writestr(name, json.dumps([llava_row(1)]))
    (tmp_path / "no.zip").write_text("nothing")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps([llava_row(1)]).encode())[:-20])
    (tmp_path / "latin.json").write_bytes("[{'é': 1}]".encode("latin-1"))
    for name, message in {
        "two.zip": r"two.zip: holds 2 files \(a.json, b.json\)",
        "no.zip": "no.zip: not a zip file",
        "cut.json.gz": "cut.json.gz: a damaged archive",
        "latin.json": "latin.json: not text in UTF-8",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_source({"type": "llava", "path": str(tmp_path / name)})


def test_lines_that_are_not_json_can_be_dropped(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(llava_row(1)), '{"id": 2, "conv', json.dumps(llava_row(3))]))
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2: not JSON"):
        load_source({"type": "llava", "path": str(path)})
    kept = load_source({"type": "llava", "path": str(path), "bad_rows": "drop"})
    assert (len(kept), kept.dropped) == (2, 1)
    assert "row 2: not JSON" in capsys.readouterr().err


def test_a_state_is_for_one_iteration(llava):
    file, folder = llava
    spec = {"type": "llava", "path": str(file), "image_folder": str(folder), "streaming": True}
    stream = load_source(spec)
    iterator = iter(stream)
    first = [next(iterator)["id"], next(iterator)["id"]]
    other = load_source(spec)
    other.load_state_dict(stream.state_dict())
    assert first + [sample["id"] for sample in other] == [sample["id"] for sample in other]


def test_shards_go_through_the_chat_template_as_datasets_reads_them(processor, llava, tmp_path):
    """In a plain table image parts have an empty text; TRL hands such rows to the processor as they are."""
    from fusedvlm.data.prepare.export import write_shards

    file, folder = llava
    write_shards({"type": "llava", "path": str(file), "image_folder": str(folder)}, tmp_path / "shards")
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "shards/*.parquet"), split="train")
    wanted = {
        sample["id"]: sample
        for sample in load_source({"type": "llava", "path": str(file), "image_folder": str(folder)})
    }
    for row in table:
        text = processor.apply_chat_template(row["messages"], tokenize=False)
        assert text == processor.apply_chat_template(wanted[row["id"]]["messages"], tokenize=False)


def test_dataset_repositories_with_splits_and_one_image_column(tmp_path):
    """A folder laid out like a repository on the Hub, opened the way one is."""
    image = save_image(tmp_path / "cat.png").read_bytes()
    messages = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"image": {"bytes": image, "path": None}, "messages": messages}] * count
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        (tmp_path / "repository").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / f"repository/{split}.parquet"))
    for split, count in (("train", 3), ("test", 2)):
        samples = both_ways(type="chat", path=str(tmp_path / "repository"), split=split)
        assert [sample["images"] for sample in samples] == [[image]] * count
    with pytest.raises(ValueError, match="dev"):
        load_source({"type": "chat", "path": str(tmp_path / "repository"), "split": "dev"})
    with pytest.raises(ValueError, match="neither JSON files"):
        load_source({"type": "chat", "path": str(tmp_path / "nowhere")})

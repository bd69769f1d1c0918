"""Questions from files: what is read, and what is refused with its row, before anything is asked."""

import io
import json

import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow

from fusedvlm.evaluation.task_options import build_tasks, parse_counts
from fusedvlm.evaluation.tasks.record_files import RecordFile
from fusedvlm.tests.evaluation.toys import choice_rows, encoded, write_tsv, yes_no_rows
from fusedvlm.tests.tiny import picture


def read(path, **options):
    return RecordFile(path.stem, str(path), **options).read()


def test_a_tsv_with_the_columns_of_vlmevalkit(tmp_path):
    first, second, third = read(write_tsv(tmp_path / "mine.tsv", choice_rows(3)))
    assert first.options == {"A": "red", "B": "green", "C": "blue", "D": "black"}
    assert (second.index, second.answers, second.fields) == ("1", ("B",), {"category": "colour", "l2-category": "all"})
    assert third.images == first.images != second.images  # the third row's cell names the first one
    assert Pillow.open(io.BytesIO(first.images[0].read())).size == picture(0).size


def test_json_lines_with_files_and_several_pictures(tmp_path):
    picture(0).save(tmp_path / "a.png")
    rows = [
        {"question": "what?", "image": "a.png", "answer": 3},
        {"id": "x", "query": "which?", "images": ["a.png", encoded(1)], "choices": ["cat", "dog"], "answer": 1},
        {"question": "which?", "image": "a.png", "options": {"A": "cat", "B": "dog"}, "answers": "cat"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    one, two, three = read(path)
    assert (one.answers, one.index, len(one.images)) == (("3",), "0", 1)
    assert (two.index, two.answers, len(two.images), two.options) == ("x", ("B",), 2, {"A": "cat", "B": "dog"})
    assert three.answers == ("A",)


def test_a_dataset_on_the_disk(tmp_path):
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    rows = {
        "image": [{"bytes": buffer.getvalue(), "path": None}] * 2,
        "question": ["what?", "who?"],
        "answer": ["a", "b"],
    }
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    (task,) = build_tasks([f"{tmp_path}/set"], tmp_path)
    assert [record.question for record in task.records()] == ["what?", "who?"]
    assert task.metric == "exact_match"
    assert len(read(tmp_path / "set", limit=1)) == 1


DAMAGE = {
    "no question": (lambda rows: rows[1].update(question=" "), "row 3: the question is empty"),
    "no answer": (lambda rows: rows[1].update(answer=""), "row 3: there is no answer"),
    "no option": (lambda rows: rows[1].update(answer="Q"), "row 3: the answer 'Q' is none of the options A, B, C, D"),
    "no picture": (lambda rows: rows[0].update(image="A" * 100), "row 2: picture: not a picture"),
    "no base64": (lambda rows: rows[0].update(image="*" * 100), "row 2: its picture"),
    "an address": (lambda rows: rows[0].update(image="https://example.org/" + "a" * 80 + ".png"), "download the picture"),
    "another row": (lambda rows: rows[2].update(image="77"), "row 4: its image is that of index '77'"),
    "twice": (lambda rows: rows[1].update(index=0), "row 3: index '0' is that of row 2"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_with_its_row(tmp_path, damage):
    rows = choice_rows(3)
    DAMAGE[damage][0](rows)
    with pytest.raises(ValueError, match=DAMAGE[damage][1]) as error:
        read(write_tsv(tmp_path / "mine.tsv", rows))
    assert len(str(error.value)) <= 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "index\tquestion\n1\twhat\n", "no column 'answer'"),
        ("a.tsv", "question\tanswer\n1\n", "row 2: 1 cells for 2 columns"),
        ("a.tsv", "question\tanswer\n", "holds no questions"),
        ("a.jsonl", "{", "row 1: damaged"),
        ("a.jsonl", "[1]\n", "row 1: must hold keys and values"),
        ("a.csv", "question,answer\n", "questions come from .tsv and .jsonl files"),
    ],
)
def test_files_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_published_files_are_read_as_pandas_reads_them(tmp_path):
    rows = choice_rows(3)
    rows[1].update(D="None", answer="D")
    rows.append({**rows[1], "index": 9, "image": ""})
    path = write_tsv(tmp_path / "mine.tsv", rows)
    records = read(path, is_published=True)
    assert len(records) == 3  # the row without a picture is left out
    assert list(records[1].options) == ["A", "B", "C"]  # "None" is an empty cell


def test_the_metric_follows_from_the_columns_unless_it_is_named(tmp_path):
    yes = write_tsv(tmp_path / "yes.tsv", yes_no_rows(2))
    choice = write_tsv(tmp_path / "choice.tsv", choice_rows(2))
    tasks = build_tasks([str(yes), str(choice), f"{yes}:anls"], tmp_path)
    assert [task.metric for task in tasks] == ["yes_no", "choice", "anls"]
    for wrong, message in {
        "nobody": "is no benchmark",
        f"{tmp_path}/x.tsv": "no such file",
        "POPE": "Download http",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_tasks([wrong], tmp_path)


def test_numbers_of_visual_tokens():
    assert parse_counts("1, 8,64") == [1, 8, 64]
    for wrong in ("", "1,,2", "a", "0", "1.5", "8,8", "-1"):
        with pytest.raises(ValueError, match="--m"):
            parse_counts(wrong)

"""Tiny public datasets in their own layouts, with images, made on the spot."""

import json

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# No clock (machines are shared) and the same examples in every run.
settings.register_profile("data", deadline=None, derandomize=True)
settings.load_profile("data")


def save_image(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def llava_row(number: int, image: str | None = None, turns: int = 1) -> dict:
    values = []
    for turn in range(turns):
        marker = "<image>\n" if image and turn == 0 else ""
        values.append({"from": "human", "value": f"{marker}Question {turn} about {number}?"})
        values.append({"from": "gpt", "value": f"Answer {turn} about {number}."})
    row = {"id": f"{number:012d}", "conversations": values}
    return {**row, "image": image} if image else row


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test may live on another one's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def llava(tmp_path):
    """mix665k in small: COCO, OCR-VQA and text-only rows; returns (json file, image folder)."""
    images = ["coco/train2017/000000000001.jpg", "ocr_vqa/images/2.jpg", "coco/train2017/000000000003.jpg", None, None]
    for number, image in enumerate(images):
        if image:
            save_image(tmp_path / "images" / image, (40 + number, 30), seed=number)
    rows = [llava_row(number, image, turns=1 + number % 2) for number, image in enumerate(images)]
    file = tmp_path / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps(rows))
    return file, tmp_path / "images"


@pytest.fixture
def svit(tmp_path):
    """SVIT in small, images in both of Visual Genome's folders; returns (detail file, referring file, image folder)."""
    folder = tmp_path / "svit_images"
    save_image(folder / "VG_100K" / "11.jpg", (64, 48))
    save_image(folder / "VG_100K_2" / "22.jpg", (30, 60))

    def item(image_id, *dialogues):
        return {
            "image_id": image_id,
            "conversations": [
                {"content": [{"from": ("user", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]}
                for texts in dialogues
            ],
        }

    detail = [
        item(11, ["Describe the image in detail.", "A red cat sleeps on a wooden table beside two cups of tea."]),
        item(22, ["What is shown?", "A tall tower stands behind a river with three white boats."]),
    ]
    referring = [
        item(
            11,
            ["Where is the cat?", "The <st>cat<ed> [0.1, 0.0, 0.5, 1.0] is on the left."],
            ["And the cups?", "Beside it."],
            ["How many?", "Two."],
        )
    ]
    for name, rows in (("detail_description", detail), ("referring_qa", referring)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path / "detail_description.json", tmp_path / "referring_qa.json", folder


@pytest.fixture
def docdownstream(tmp_path):
    """DocDownstream-1.0 in small; returns its train.jsonl."""
    folder = tmp_path / "DocDownstream-1.0"
    rows = []
    for number in range(3):
        image = f"./imgs/DUE_Benchmark/DocVQA/pngs/{number}.png"
        save_image(folder / image, seed=number)
        rows.append(
            {
                "image": [image],
                "messages": [
                    {"role": "user", "content": f"<|image|>What is item {number}?"},
                    {"role": "assistant", "content": f"number {number}"},
                ],
                "task_name": "qa_sft",
                "dataset_name": "DocVQA",
            }
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"

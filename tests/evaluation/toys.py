"""Made-up copies of the paper's fifteen benchmarks in their published layouts: the official columns, a few rows each."""

import base64
import csv
import io
from pathlib import Path

from fusedvlm.evaluation.tasks.paper_benchmarks import BENCHMARKS, COGNITION, PERCEPTION
from fusedvlm.tests.tiny import picture

LETTERS = "ABCD"
WORDS = ("red", "green", "blue", "black", "white", "cyan")
CATEGORIES = ("Regular Text Recognition", "Scene Text-centric VQA", "Handwritten Mathematical Expression Recognition")


def encoded(seed: int) -> str:
    """A picture as a TSV has it."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path: Path, rows: list[dict]) -> Path:
    """Rows under the columns of the first one."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice_rows(count: int) -> list[dict]:
    """Choices; the third row's picture is that of the first."""
    rows = []
    for number in range(count):
        options = [WORDS[(number + step) % len(WORDS)] for step in range(4)]
        image = "0" if number == 2 else encoded(number)
        rows.append(
            {"index": number, "image": image, "question": f"what colour is {number}?", **dict(zip(LETTERS, options, strict=True)),
             "answer": LETTERS[number % 4], "category": "colour", "l2-category": "all"}
        )  # fmt: skip
    return rows


def yes_no_rows(count: int, **fields: list[str]) -> list[dict]:
    """Questions with yes or no."""
    return [
        {"index": number, "image": encoded(number), "question": f"is {number} red?", "answer": ("Yes", "No")[number % 2],
         **{name: values[number % len(values)] for name, values in fields.items()}}
        for number in range(count)
    ]  # fmt: skip


def short_rows(count: int, answers: int) -> list[dict]:
    """Questions with answers as a Python list."""
    return [
        {"index": number, "image": encoded(number), "question": f"which number is {number}?",
         "answer": str([WORDS[number % 6]] * (answers - 1) + [str(number)])}
        for number in range(count)
    ]  # fmt: skip


def hallusion_rows() -> list[dict]:
    """Two sets of two figures with two questions each."""
    rows = []
    for set_ in range(2):
        for figure in range(2):
            for question in range(2):
                rows.append(
                    {"index": f"VD_illusion_1_{set_}_{figure}_{question}", "image": encoded(2 * set_ + figure),
                     "category": "VD", "l2-category": "illusion", "question": f"is line {question} longer?",
                     "answer": ("Yes", "No")[(figure + question) % 2]}
                )  # fmt: skip
    # A question without a picture, which VLMEvalKit leaves out.
    return [*rows, {**rows[0], "index": "VS_chart_0_9_0_1", "image": ""}]


def mme_rows() -> list[dict]:
    """Two pictures of two questions in every category."""
    rows = []
    for category in (*PERCEPTION, *COGNITION):
        for number in range(4):
            rows.append(
                {"index": len(rows), "image": encoded(number // 2), "category": category,
                 "image_path": f"{category}/{number // 2}.png", "question": f"is {number} there? Please answer yes or no.",
                 "answer": ("Yes", "No")[number % 2]}
            )  # fmt: skip
    return rows


def rows_of(name: str, count: int) -> list[dict]:
    """Rows of a benchmark."""
    if name == "POPE":
        return yes_no_rows(count, category=["random,popular", "popular", "adversarial"])
    if name == "MME":
        return mme_rows()
    if name == "HallusionBench":
        return hallusion_rows()
    if name == "COCO_VAL":
        rows = [
            {**row, "answer": str([f"A {WORDS[k]} picture, {k}.", "two cats sit."])}
            for k, row in enumerate(short_rows(4, 1))
        ]
        return [{key: value for key, value in row.items() if key != "question"} for row in rows]
    if name == "OCRBench":
        rows = short_rows(count, 2)
        return [{**row, "category": CATEGORIES[number % 3]} for number, row in enumerate(rows)]
    if name == "TextVQA_VAL":
        return short_rows(count, 10)
    if name in ("ChartQA_TEST", "OCRVQA_TESTCORE"):
        return [{**row, "answer": str([str(10 * number)])} for number, row in enumerate(short_rows(count, 2))]
    if name == "SEEDBench2":
        return [{**row, "image": str([encoded(1), encoded(2)])} for row in choice_rows(count)]
    if name == "ScienceQA_TEST":
        return [
            {**row, "hint": "Look closely.\nTwice." if number % 2 else ""}
            for number, row in enumerate(choice_rows(count))
        ]
    return choice_rows(count)


def write_benchmarks(folder: Path, names: list[str] | None = None, count: int = 4) -> Path:
    """All fifteen, NAME.tsv each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or BENCHMARKS:
        write_tsv(folder / f"{name}.tsv", rows_of(name, count))
    return folder

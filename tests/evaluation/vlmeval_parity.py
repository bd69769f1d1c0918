"""VLMEvalKit's own prompts and scores of the toys, for made-up predictions; runs where VLMEvalKit is installed.

    python -m fusedvlm.tests.evaluation.vlmeval_parity FOLDER > vlmeval_scores.json

writes the toys to FOLDER and prints {benchmark: {"prompts": {index: text}, "scores": {metric: number}}} and the
edition; tests/evaluation/test_paper_benchmarks.py compares it with ours.
"""

import importlib.metadata
import json
import os
import random
import sys
from pathlib import Path

from fusedvlm.evaluation.cli import DATA
from fusedvlm.evaluation.tasks.paper_benchmarks import BENCHMARKS, paper_metrics, paper_task
from fusedvlm.evaluation.tasks.task import Record
from fusedvlm.tests.evaluation.toys import write_benchmarks

COUNT = 12  # rows of a toy
ODD = (
    "Yes", "no", "Yes, it is.", "no, yes", "perhaps", "A", "(B)", "C. blue", "d", "the answer is B", "green", "red or blue",
    "Sorry, I can't help with images of people yet.", "30", "31.2", "0.5%", "The red", "two cats sit.", "A red picture, 0.",
)  # fmt: skip


def predictions(name: str, records: list[Record]) -> dict[str, str]:
    """A made-up answer to each record: often right, else odd."""
    generator = random.Random(name)
    return {
        record.index: record.answers[0] if generator.random() < 0.5 else generator.choice(ODD) for record in records
    }


def score_by_vlmeval(name: str, work: Path) -> dict:
    """Prompts and scores of one benchmark; its file lies in $LMUData."""
    from vlmeval.dataset import build_dataset

    records = list(paper_task(Path(os.environ[DATA]) / f"{name}.tsv").records())
    said = predictions(name, records)
    dataset = build_dataset(name)
    prompts = {}
    for number in range(len(dataset)):
        line = dataset[number]
        prompts[str(line["index"])] = next(p["value"] for p in dataset.build_prompt(line) if p["type"] == "text")
    table = dataset.data.drop(columns="image")
    table["prediction"] = [said[str(index)] for index in table["index"]]
    path = work / f"said_{name}.xlsx"
    table.to_excel(path, index=False)
    found = dataset.evaluate(str(path), model="exact_matching", nproc=1)
    return {"prompts": prompts, "scores": named_scores(name, found)}


def named_scores(name: str, found) -> dict[str, float]:
    """What VLMEvalKit returns, under the paper's names of the metrics and in its units."""
    return paper_metrics(name, found if isinstance(found, dict) else found.iloc[0].to_dict())


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    write_benchmarks(folder / "LMUData", count=COUNT)
    os.environ[DATA] = str(folder / "LMUData")
    out, sys.stdout = sys.stdout, sys.stderr
    import vlmeval.dataset

    for kind in vlmeval.dataset.DATASET_CLASSES:
        kind.DATASET_MD5 = {}  # the toys are not the official files
    scores = {name: score_by_vlmeval(name, folder) for name in BENCHMARKS}
    edition = "ms-vlmeval" if "ms-vlmeval" in {d.name for d in importlib.metadata.distributions()} else "vlmeval"
    document = {"edition": edition, "version": importlib.metadata.version(edition), "benchmarks": scores}
    out.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

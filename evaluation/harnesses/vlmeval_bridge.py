"""VLMEvalKit's data, prompts and scores as files; run by the Python of its own environment, never imported by ours.

    python vlmeval_bridge.py        reads commands, a line of JSON each, and answers each with a line of JSON

    {"action": "export", "name": NAME, "folder": F}    F/NAME.requests.jsonl: index, images, prompt of each question
    {"action": "score", "name": NAME, "folder": F}     F/NAME.said.json {m: {index: answer}} to F/NAME.scores.json

Nothing here is from this package, so that the environment needs VLMEvalKit alone. Importing it takes long, switches
gradients off and seeds random numbers: it happens once, in a process of its own. Both editions, `ms-vlmeval` and a
clone, are understood.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import vlmeval.dataset

DATA = "LMUData"
OFFICIAL: dict[str, str] = {}  # {dataset: MD5 of its official file}


def edition() -> tuple[str, str]:
    """Name and version of the installed edition."""
    for name in ("ms-vlmeval", "vlmeval"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vlmeval", "clone"


def load(name: str) -> tuple[Any, str, bool | None]:
    """A dataset, the SHA-256 of its file, and whether that is the official one (None where none is known).

    A file of another content would be downloaded anew over the user's own.
    """
    path = Path(os.environ.get(DATA, Path.home() / DATA)) / f"{name}.tsv"
    is_official, digest = None, ""
    if path.is_file():
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        # Classes share these tables, so the official sums are read before any is replaced.
        kinds = [kind for kind in vlmeval.dataset.DATASET_CLASSES if name in (getattr(kind, "DATASET_MD5", None) or {})]
        officials = {OFFICIAL.setdefault(name, kind.DATASET_MD5[name]) for kind in kinds}
        is_official = officials == {md5} if officials else None
        for kind in kinds:
            kind.DATASET_MD5 = {**kind.DATASET_MD5, name: md5}
    dataset = vlmeval.dataset.build_dataset(name)
    if dataset is None:
        raise ValueError(f"VLMEvalKit knows no dataset {name!r}, and there is no {path} with columns A and B.")
    return dataset, digest, is_official


def export(name: str, folder: Path) -> None:
    """Write every question as VLMEvalKit would ask it."""
    dataset, digest, is_official = load(name)
    # Its own folder keeps pictures by the row's index: those of other data under that name would be taken for these.
    dataset.img_root = str(folder / "images" / f"{name}-{digest[:16]}")
    rows = []
    for number in range(len(dataset)):
        line = dataset[number]
        message = dataset.build_prompt(line)
        texts = [part["value"] for part in message if part["type"] == "text"]
        images = [str(Path(part["value"]).resolve()) for part in message if part["type"] == "image"]
        bare = str(line["question"]) if "question" in line else ""
        rows.append({"index": str(line["index"]), "images": images, "prompt": "\n".join(texts), "question": bare})
    kind, version = edition()
    head = {
        "kind": dataset.TYPE, "edition": kind, "version": version, "data_sha256": digest, "is_official": is_official,
    }  # fmt: skip
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [head, *rows])
    (folder / f"{name}.requests.jsonl").write_text(text, encoding="utf-8")


def score(name: str, folder: Path) -> None:
    """Score the answers at every m by VLMEvalKit's own `evaluate`, without a judge."""
    dataset, _, _ = load(name)
    said = json.loads((folder / f"{name}.said.json").read_text(encoding="utf-8"))
    found = {}
    for m, answers in said.items():
        work = folder / f"m{m}"
        work.mkdir(exist_ok=True)
        for old in work.glob(f"fusedvlm_{name}*"):
            old.unlink()  # scores of earlier answers would be taken for those of these
        table = dataset.data.drop(columns=[column for column in ("image",) if column in dataset.data])
        table["prediction"] = [answers[str(index)] for index in table["index"]]
        path = work / f"fusedvlm_{name}.xlsx"
        table.to_excel(path, index=False)
        found[m] = plain(dataset.evaluate(str(path), model="exact_matching", nproc=1))
    (folder / f"{name}.scores.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def plain(found: Any) -> dict[str, Any]:
    """What VLMEvalKit returned, as numbers by name; of several splits that of the whole."""
    if not isinstance(found, dict):
        rows = found.to_dict("records")
        whole = [row for row in rows if str(row.get("split", "Overall")) in ("Overall", "none", "nan")]
        found = (whole or rows)[0]
    numbers = {str(name): value for name, value in found.items()}
    return {
        name: [float(part) for part in value] if isinstance(value, (list, tuple)) else float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float, list, tuple)) or hasattr(value, "item")
    }


def obey(command: dict[str, str]) -> dict[str, str]:
    """Do one command; what VLMEvalKit raises, and it raises anything, is told."""
    try:
        action = {"export": export, "score": score}[command["action"]]
        action(command["name"], Path(command["folder"]))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {}


def main() -> None:
    """Obey until the input ends; anything that VLMEvalKit prints goes to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        out.write(json.dumps(obey(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()

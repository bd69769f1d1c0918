"""Benchmarks by VLMEvalKit: it exports the questions, our runner answers them at every m, it scores the answers."""

import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fusedvlm.console import say
from fusedvlm.evaluation.results import TaskScore
from fusedvlm.evaluation.tasks.paper_benchmarks import BENCHMARKS, POINTS, paper_metrics
from fusedvlm.evaluation.tasks.record_files import ImageStore
from fusedvlm.evaluation.tasks.task import Judged, Metric, Record

from .tool_python import find_python

VLMEVALKIT = "vlmevalkit"
BRIDGE = Path(__file__).parent / "vlmeval_bridge.py"
VARIABLE = "FUSEDVLM_VLMEVAL"  # its Python, where that is elsewhere
CAPS = {"TextVQA": 10, "OCRVQA": 100, "ChartQA": 100}  # of the paper's wrapper, by part of the name
SHORT_KINDS = ("MCQ", "Y/N", "Caption")  # 32 tokens; 512 for all else


def vlmeval_python() -> Path:
    """The Python that has VLMEvalKit. Raises `ValueError` saying how to install it."""
    return find_python("vlmevalkit", "vlmeval", VARIABLE, "VLMEvalKit")


class Bridge:
    """A process that has imported VLMEvalKit, which exports and scores; started when it is first needed.

    Args:
        data: folder of the benchmarks' files.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self.process: subprocess.Popen[str] | None = None
        self.said: IO[str] | None = None

    def tell(self, action: str, name: str, folder: Path) -> None:
        """Let VLMEvalKit export or score a benchmark.

        Raises:
            RuntimeError: with what it said, when it failed; it never counts as done then.
        """
        process = self.process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"action": action, "name": name, "folder": str(folder.resolve())}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        problem = json.loads(line).get("error") if line else self._last_words()
        if problem is not None:
            raise RuntimeError(f"VLMEvalKit failed to {action} {name}: {problem[:200]}")

    def _start(self) -> "subprocess.Popen[str]":
        say("VLMEvalKit starts.")
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        environment = {**os.environ, "LMUData": str(self.data.resolve())}
        self.process = subprocess.Popen(
            [str(vlmeval_python()), str(BRIDGE)], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.said,
        )  # fmt: skip
        weakref.finalize(self, self.process.kill)
        return self.process

    def _last_words(self) -> str:
        assert self.said is not None
        self.said.seek(0)
        lines = [line.strip() for line in self.said if line.strip()]
        return f"it ended, saying {lines[-1]}" if lines else "it ended without a word"


@dataclass
class VlmevalTask:
    """A benchmark as VLMEvalKit asks it. Its answers are scored there, so `parse` and `score` say nothing here.

    Args:
        name: that VLMEvalKit knows.
        folder: of the exported files.
        bridge: to VLMEvalKit.
        bare_question: whether the fusion module reads the question without options and instructions.
        max_new_tokens: cap of an answer; 0 for the paper's.
    """

    name: str
    folder: Path
    bridge: Bridge
    bare_question: bool = False
    max_new_tokens: int = 0
    head: dict[str, Any] = field(default_factory=dict, init=False)
    _records: list[Record] | None = field(default=None, init=False, repr=False)

    def records(self) -> Sequence[Record]:
        """Every question, exported when it is first asked for."""
        if self._records is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.bridge.tell("export", self.name, self.folder)
            self._records = self._read(self.folder / f"{self.name}.requests.jsonl")
            self.max_new_tokens = self.max_new_tokens or self._cap()
        return self._records

    def _read(self, path: Path) -> list[Record]:
        self.head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        store = ImageStore()
        return [
            Record(
                row["index"],
                row["question"],
                (),
                tuple(store.add(Path(image).read_bytes(), image) for image in row["images"]),
                fields={"prompt": row["prompt"]},
                place=f"row {number}",
            )
            for number, row in enumerate(rows, 1)
        ]

    def _cap(self) -> int:
        named = next((cap for part, cap in CAPS.items() if part in self.name), None)
        return named or (32 if self.head["kind"] in SHORT_KINDS else 512)

    def prompt(self, record: Record) -> str:
        """As VLMEvalKit made it."""
        return record.fields["prompt"]

    def question(self, record: Record) -> str:
        """What the fusion module reads."""
        return (record.question or self.prompt(record)) if self.bare_question else self.prompt(record)

    def parse(self, record: Record, answer: str) -> str | None:
        """The answer as it is: VLMEvalKit reads it."""
        return answer or None

    def score(self, record: Record, parsed: str | None) -> float:
        """Nothing here."""
        return 0.0

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """None here; see `score_rows`."""
        return []

    def facts(self) -> dict[str, Any]:
        """What the results say."""
        return {
            "data_file": f"{self.name}.tsv",
            "data_sha256": self.head.get("data_sha256", ""),
            "is_official": self.head.get("is_official"),
            "preset": "paper",
            "max_new_tokens": self.max_new_tokens,
            "question": "bare question" if self.bare_question else "whole prompt",
            "edition": self.head.get("edition", ""),
        }

    @property
    def harness(self) -> tuple[str, str]:
        """Name and version, for records."""
        return VLMEVALKIT, f"{self.head['edition']} {self.head['version']}"

    def score_rows(self, answers: Mapping[int, Mapping[str, str]], source: str, note: str) -> list[TaskScore]:
        """A row for every metric and m, by VLMEvalKit's own scoring.

        Args:
            answers: {m: {index: answer}}.
            source, note: of the rows.

        Raises:
            RuntimeError: when it failed, or scored nothing.
        """
        said = {str(m): dict(by_index) for m, by_index in answers.items()}
        (self.folder / f"{self.name}.said.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
        self.bridge.tell("score", self.name, self.folder)
        found = json.loads((self.folder / f"{self.name}.scores.json").read_text(encoding="utf-8"))
        rows = []
        for m in sorted(answers):
            metrics = self._named(found[str(m)])
            if not metrics:
                raise RuntimeError(f"VLMEvalKit gave no score for {self.name} at m={m}.")
            for number, (metric, value) in enumerate(metrics.items()):
                rows.append(
                    TaskScore(
                        self.name, m, value, len(self.records()), None, metric=metric, scale=self._scale(metric),
                        harness=VLMEVALKIT, note=note, is_primary=number == 0, source=source,
                        error_note="VLMEvalKit states none",
                    )
                )  # fmt: skip
        return rows

    def _named(self, found: Mapping[str, Any]) -> dict[str, float]:
        if self.name in BENCHMARKS:
            return paper_metrics(self.name, found)
        return {name: value for name, value in found.items() if isinstance(value, float) and name != "split"}

    def _scale(self, metric: str) -> str:
        if self.name not in BENCHMARKS:
            return ""
        if metric == "CIDEr":
            return "from 0"
        points = POINTS.get((self.name, metric))
        return f"0..{points or 100}"

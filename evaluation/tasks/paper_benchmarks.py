"""The fifteen benchmarks of "Scaling Capability in Token Space" with its prompts, caps and metrics: preset `paper`.

Prompts, parsing and metrics are those of VLMEvalKit with `exact_matching`, by which the paper was measured; caps of
answers are those of its wrapper: 32 tokens for choices, yes/no and captions, 10 for TextVQA, 100 for OCRVQA and
ChartQA, 512 for OCRBench. Scores are in the paper's units: per cent, and points for MME and OCRBench.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .answer_scores import contains_answer
from .record_files import RecordFile
from .task import Judged, Metric, Record, bootstrap_error, mean_metric
from .task_kinds import (
    SHORT,
    Captions,
    Choice,
    ContainsAnswer,
    ExactMatch,
    FileTask,
    RelaxedAccuracy,
    VqaAccuracy,
    YesNo,
)

PAPER = "paper"
CAPTION_REQUEST = (
    'Please describe this image in general. Directly provide the description, do not include prefix like "This image '
    'depicts". '
)
PERCEPTION = (
    "OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene",
)  # fmt: skip
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
FORMULAS = "Handwritten Mathematical Expression Recognition"
POINTS_PER_CATEGORY = 200
ADDRESS = "https://opencompass.openxlab.space/utils/"


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark.

    Args:
        task: class that asks and scores.
        max_new_tokens: cap of an answer.
        md5: of the official file, as VLMEvalKit lists it.
        address: where the official file is published, below `ADDRESS`, or a whole address.
        metrics: as the paper names them, the primary one first.
        options: further arguments of the class.
    """

    task: type[FileTask]
    max_new_tokens: int
    md5: str
    address: str
    metrics: tuple[str, ...] = ("Overall",)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where the official file is published."""
        return self.address if "//" in self.address else ADDRESS + self.address


class ShortTextVqa(VqaAccuracy):
    """A question with the request for a word or a phrase."""

    def prompt(self, record: Record) -> str:
        """As VLMEvalKit asks."""
        return record.question + SHORT


class ShortChartQa(RelaxedAccuracy):
    """A question about a chart with the request for a word or a phrase."""

    def prompt(self, record: Record) -> str:
        """As VLMEvalKit asks."""
        return record.question + SHORT


class ShortOcrVqa(ExactMatch):
    """A question about a book cover with the request for a word or a phrase."""

    def prompt(self, record: Record) -> str:
        """As VLMEvalKit asks."""
        return record.question + SHORT


class OcrBench(ContainsAnswer):
    """Points: right answers found inside what was said; formulas without spaces, and with case."""

    def compare(self, parsed: str, record: Record) -> float:
        """1 or 0."""
        is_formula = record.fields.get("category") == FORMULAS
        return contains_answer(parsed, record.answers, keep_case=is_formula, drop_spaces=is_formula)

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """The number of right answers."""
        mean = mean_metric("Final Score", [entry.score for entry in judged], float(len(judged)))
        return [replace(mean, error_note=mean.error_note or "of the sum")]


class Pope(YesNo):
    """F1 of "yes" first, then accuracy, precision and recall; a question of several categories counts in each."""

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """Per cent."""
        counted = [
            entry for entry in judged for _ in (entry.record.fields.get("category") or "all").split(",")
        ]  # fmt: skip
        wanted = np.array([entry.record.answers[0] == "Yes" for entry in counted])
        said = np.array([entry.parsed == "Yes" for entry in counted])

        def f1(drawn: np.ndarray) -> float:
            both = float((wanted[drawn] & said[drawn]).sum())
            return 200 * both / max(1.0, float(wanted[drawn].sum() + said[drawn].sum()))

        every = np.arange(len(counted))
        error = bootstrap_error(f1, len(counted))
        note = "one question has no spread" if error is None else "bootstrap over questions"
        return [
            Metric("Overall", f1(every), "0..100", len(counted), error, note),
            mean_metric("acc", [entry.score for entry in counted], 100.0, is_primary=False),
            _share("precision", wanted[said], 'no answer was "yes"'),
            _share("recall", said[wanted], 'no right answer is "yes"'),
        ]


def _share(name: str, hits: np.ndarray, why_none: str) -> Metric:
    if not len(hits):
        return Metric(name, 0.0, "0..100", 0, None, why_none, False)
    return mean_metric(name, hits.astype(float), 100.0, is_primary=False)


class Mme(YesNo):
    """Points by category: accuracy plus the share of pictures whose questions are all answered rightly, times 100."""

    def records(self) -> Sequence[Record]:
        """Every question. Raises `ValueError` where a row does not say which picture it belongs to."""
        records = super().records()
        if lacking := next((record for record in records if "image_path" not in record.fields), None):
            raise ValueError(
                f"{self.source.path}, {lacking.place}: MME pairs questions by image_path, which is missing."
            )
        return records

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """Overall, perception and cognition."""
        pictures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for entry in judged:
            fields = entry.record.fields
            pictures[fields.get("category", "")][fields["image_path"]].append(entry.score)
        found = [self._sum(name, categories, pictures, judged) for name, categories in (
            ("Overall", (*PERCEPTION, *COGNITION)), ("Perception", PERCEPTION), ("Cognition", COGNITION))]  # fmt: skip
        return [replace(metric, is_primary=metric.name == "Overall") for metric in found]

    @staticmethod
    def _sum(name: str, categories: Iterable[str], pictures: dict, judged: Sequence[Judged]) -> Metric:
        value, variance, lone = 0.0, 0.0, False
        named = [category for category in categories if category in pictures]
        for category in named:
            groups = list(pictures[category].values())
            single = [score for group in groups for score in group]
            value += 100 * (float(np.mean(single)) + float(np.mean([np.prod(group) for group in groups])))
            points = [100 * (np.mean(group) + np.prod(group)) for group in groups]
            lone = lone or len(points) < 2
            variance += 0.0 if len(points) < 2 else float(np.var(points, ddof=1)) / len(points)
        count = sum(entry.record.fields.get("category") in named for entry in judged)
        scale = f"0..{POINTS_PER_CATEGORY * len(list(categories))}"
        if lone or not named:
            return Metric(name, value, scale, count, None, "a category with fewer than two pictures")
        return Metric(name, value, scale, count, variance**0.5, "of sums over categories, picture by picture")


class Hallusion(YesNo):
    """Mean of three accuracies: of answers (aAcc), of figures (fAcc) and questions (qAcc) that are right throughout."""

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """Per cent."""
        answers = mean_metric("aAcc", [entry.score for entry in judged], 100.0, is_primary=False)
        figures = self._groups("fAcc", judged, 4)
        questions = self._groups("qAcc", judged, 5)
        overall = float(np.mean([answers.value, figures.value, questions.value]))
        note = "the three accuracies are of the same answers"
        return [Metric("Overall", overall, "0..100", len(judged), None, note), answers, figures, questions]

    def _groups(self, name: str, judged: Sequence[Judged], part: int) -> Metric:
        groups: dict[tuple, list[float]] = defaultdict(list)
        for entry in judged:
            parts = entry.record.index.split("_")
            if len(parts) < 6:
                raise ValueError(
                    f"{self.source.path}, {entry.record.place}: index {entry.record.index!r} must be "
                    "category_subcategory_visual_set_figure_question."
                )
            groups[entry.record.fields.get("l2-category", ""), parts[3], parts[part]].append(entry.score)
        return mean_metric(name, [float(all(scores)) for scores in groups.values()], 100.0, is_primary=False)


class PaperCaptions(Captions):
    """COCO captions with the paper's request."""

    def prompt(self, record: Record) -> str:
        """The same for every picture."""
        return record.question


def _choice(md5: str, address: str) -> Benchmark:
    return Benchmark(Choice, 32, md5, address)


BENCHMARKS: dict[str, Benchmark] = {
    "AI2D_TEST": _choice("0f593e0d1c7df9a3d69bf1f947e71975", "VLMEval/AI2D_TEST.tsv"),
    "ChartQA_TEST": Benchmark(ShortChartQa, 100, "c902e0aa9be5582a7aad6dcf52734b42", "VLMEval/ChartQA_TEST.tsv"),
    "COCO_VAL": Benchmark(
        PaperCaptions, 32, "72a5079dead060269ac222c5aa5128af", "VLMEval/COCO_VAL.tsv",
        ("CIDEr", "BLEU-1", "BLEU-4", "ROUGE-L"), {"tokenizer": "raw"},
    ),
    "HallusionBench": Benchmark(
        Hallusion, 32, "0c23ac0dc9ef46832d7a24504f2a0c7c", "VLMEval/HallusionBench.tsv",
        ("Overall", "aAcc", "fAcc", "qAcc"),
    ),
    "MME": Benchmark(
        Mme, 32, "b36b43c3f09801f5d368627fb92187c3", "VLMEval/MME.tsv", ("Overall", "Perception", "Cognition")
    ),
    "MMStar": _choice("e1ecd2140806c1b1bbf54b43372efb9e", "VLMEval/MMStar.tsv"),
    "OCRBench": Benchmark(
        OcrBench, 512, "e953d98a987cc6e26ef717b61260b778", "VLMEval/OCRBench.tsv", ("Final Score",)
    ),
    "OCRVQA_TESTCORE": Benchmark(
        ShortOcrVqa, 100, "c5239fe77db8bdc1f2ad8e55e0d1fe97", "VLMEval/OCRVQA_TESTCORE.tsv"
    ),
    "POPE": Benchmark(
        Pope, 32, "c12f5acb142f2ef1f85a26ba2fbe41d5", "VLMEval/POPE.tsv", ("Overall", "acc", "precision", "recall")
    ),
    "RealWorldQA": _choice("4de008f55dc4fd008ca9e15321dc44b7", "VLMEval/RealWorldQA.tsv"),
    "ScienceQA_TEST": _choice("e42e9e00f9c59a80d8a5db35bc32b71f", "benchmarks/ScienceQA/ScienceQA_TEST.tsv"),
    "SEEDBench2": _choice(
        "4ec15cf864c4f16274112284f531813e",
        "https://huggingface.co/datasets/VLMEval/SEEDBench2/resolve/main/SEEDBench2.tsv",
    ),
    "SEEDBench2_Plus": _choice("e32d3216dc4f452b0fe497a52015d1fd", "benchmarks/SEEDBench/SEEDBench2_Plus.tsv"),
    "SEEDBench_IMG": _choice("68017231464752261a2526d6ca3a10c0", "benchmarks/SEEDBench/SEEDBench_IMG.tsv"),
    "TextVQA_VAL": Benchmark(ShortTextVqa, 10, "b233b31f551bbf4056f2f955da3a92cd", "VLMEval/TextVQA_VAL.tsv"),
}  # fmt: skip


def find_benchmark(name: str, folder: Path) -> Path:
    """The file of a benchmark.

    Raises:
        ValueError: saying where the official one is published, when there is none.
    """
    path = folder / f"{name}.tsv"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist. Download {BENCHMARKS[name].url} to it, or name its folder with --data."
        )
    return path


def paper_task(path: Path, bare_question: bool = False, limit: int | None = None) -> FileTask:
    """A benchmark by its file, NAME.tsv; whether that is the official one is in its facts.

    Args:
        path: of the file.
        bare_question: whether the fusion module reads the question without options and instructions.
        limit: first questions only.
    """
    benchmark = BENCHMARKS[path.stem]
    question = CAPTION_REQUEST if benchmark.task is PaperCaptions else ""
    source = RecordFile(path.stem, str(path), limit=limit, is_published=True, default_question=question)
    is_official = source.checksums()["md5"] == benchmark.md5
    make: Callable[..., FileTask] = benchmark.task
    return make(
        source,
        max_new_tokens=benchmark.max_new_tokens,
        bare_question=bare_question,
        scale=100.0,
        preset=PAPER,
        metric_name="Overall",
        about={"is_official": is_official},
        **benchmark.options,
    )


# Scales in points, of metrics that are no per cent.
POINTS = {
    ("MME", "Overall"): 2800, ("MME", "Perception"): 2000, ("MME", "Cognition"): 800, ("OCRBench", "Final Score"): 1000,
}  # fmt: skip


def paper_metrics(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    """Scores as VLMEvalKit names them, under the paper's names and in its units.

    Raises:
        ValueError: for a metric that is missing.
    """
    numbers = dict(found)
    numbers.update({f"BLEU-{size}": value for size, value in enumerate(numbers.get("Bleu") or [], 1)})
    numbers["ROUGE-L"] = numbers.get("ROUGE_L")
    if name == "MME":
        numbers.update(Perception=numbers["perception"], Cognition=numbers["reasoning"])
        numbers["Overall"] = numbers["Perception"] + numbers["Cognition"]
    if name == "HallusionBench":
        numbers["Overall"] = (numbers["aAcc"] + numbers["fAcc"] + numbers["qAcc"]) / 3
    wanted = BENCHMARKS[name].metrics
    if missing := [metric for metric in wanted if not isinstance(numbers.get(metric), (int, float))]:
        raise ValueError(f"{name}: VLMEvalKit gave no {missing[0]}; it gave {', '.join(found)[:150]}.")
    factor = 100.0 if BENCHMARKS[name].task is Choice else 1.0  # shares there, per cent in the paper
    return {metric: factor * float(numbers[metric]) for metric in wanted}

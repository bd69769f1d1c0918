"""One self-contained HTML page of everything a folder holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusedvlm.charts import figure_uri as _uri
from fusedvlm.console import progress
from fusedvlm.files import read_json, write_atomically
from fusedvlm.question_scores import ENDING
from fusedvlm.scaling.divergence.estimators import DivergenceResult
from fusedvlm.scaling.laws.compare_curves import ModelScore, cluster_curves, input_effects, read_models
from fusedvlm.scaling.laws.fit import CurveFit, fit_curve
from fusedvlm.scaling.score_records import (
    PAPER,
    Curve,
    ScoreRecord,
    evaluation_records,
    group_curves,
    points_matching,
    read_scores,
)
from fusedvlm.scaling.tradeoff.fit_tradeoff import GridCell, TradeoffFit, fit_tradeoff, read_grid, read_grids
from fusedvlm.templates import load_template

from .figures import (
    alpha_against_n,
    bound_against_distance,
    cluster_panels,
    cosine_histograms,
    fitted_curves,
    input_effect_bars,
    intra_against_cross,
    latency_against_m,
    psi_against_n,
    radar,
    tradeoff_plot,
)

# Values of `fusion_inputs` that the paper compares: with the question, and its fine-tuned counterpart without.
WITH_QUESTION, WITHOUT_QUESTION = "vision+question+queries", "vision+queries (ft)"


TEMPLATE = Path(__file__).parent / "report.html.jinja"


@dataclass
class ReportInputs:
    """What was found, by kind; `left_out` names files that are none of these, with the reason."""

    title: str
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    divergences: dict[str, DivergenceResult] = field(default_factory=dict)
    grids: dict[str, list[GridCell]] = field(default_factory=dict)
    models: dict[str, list[ModelScore]] = field(default_factory=dict)
    latencies: dict[str, list[dict]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.curves or self.divergences or self.grids or self.models or self.latencies)


@dataclass
class Section:
    """A heading, a sentence, a figure as a data URI, and a table."""

    title: str
    text: str
    image: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def collect(folder: str | Path, exclude: Sequence[str] = ()) -> ReportInputs:
    """Read a folder (not its sub-folders), or "paper" for the published scores and grid.

    Raises:
        ValueError: a file of a known kind with a bad row, an exclusion without a match, or nothing to show.
        OSError: when the folder cannot be read.
    """
    inputs = ReportInputs(title="Scaling of visual tokens")
    scores: dict[str, list[ScoreRecord]] = {}
    if str(folder) == PAPER:
        scores["paper"] = read_scores(PAPER)
        inputs.grids["published grid, reasoning"] = read_grid()
    else:
        for path in sorted(Path(folder).iterdir()):
            if path.suffix in (".csv", ".json") and not path.name.endswith(ENDING):
                _read_file(path, inputs, scores)
    rules = _rules_per_source(scores, exclude)
    for name, records in scores.items():
        inputs.curves[name] = group_curves(records, rules[name])
    if inputs.empty:
        looked = ", ".join(inputs.left_out) or "no .csv or .json file"
        raise ValueError(f"{folder}: nothing to report ({looked}). See `fusedvlm scaling report --help`.")
    return inputs


def write_report(inputs: ReportInputs, page: Path, resamples: int = 2000) -> dict:
    """Write the page; returns its path and the numbers of all fits, JSON-ready."""
    fits = {
        name: [fit_curve(curve, resamples=resamples) for curve in progress(curves, f"fitting {name}", leave=False)]
        for name, curves in inputs.curves.items()
    }
    tradeoffs = {name: fit_tradeoff(cells, text_tokens=50) for name, cells in inputs.grids.items()}
    sections = [
        *(section for name, fitted in fits.items() for section in _score_sections(name, fitted)),
        *_divergence_sections(inputs.divergences),
        *(_tradeoff_section(name, inputs.grids[name], fit) for name, fit in tradeoffs.items()),
        *(Section(f"Models: {name}", "Each benchmark relative to its best model.", _uri(radar(scores)))
          for name, scores in inputs.models.items()),
        *(_latency_section(name, rows) for name, rows in inputs.latencies.items()),
    ]  # fmt: skip
    html = load_template(TEMPLATE, is_html=True, lstrip_blocks=True).render(
        title=inputs.title, sections=sections, left_out=inputs.left_out
    )
    write_atomically(page, html)
    return {
        "report": str(page),
        "sections": [section.title for section in sections],
        "fits": [{"source": name, **fit.record()} for name, fitted in fits.items() for fit in fitted],
        "left_out": inputs.left_out,
    }


def _rules_per_source(scores: dict[str, list[ScoreRecord]], exclude: Sequence[str]) -> dict[str, list[str]]:
    """Exclusions that match something in a source; one that matches nowhere is an error."""
    rules: dict[str, list[str]] = {name: [] for name in scores}
    for rule in exclude:
        failures = []
        for name, records in scores.items():
            try:
                points_matching(records, rule)
                rules[name].append(rule)
            except ValueError as error:
                failures.append(error)
        if len(failures) == len(scores):
            raise failures[0] if failures else ValueError(f"Exclusion {rule!r}: there are no scores to exclude from.")
    return rules


def _read_file(path: Path, inputs: ReportInputs, scores: dict[str, list[ScoreRecord]]) -> None:
    """Recognize a file by its columns or fields; an unknown one is noted, a broken known one raises."""
    if path.suffix == ".csv":
        header = next((line for line in path.read_text(encoding="utf-8-sig").splitlines() if line[:1] not in "#"), "")
        columns = {name.strip() for name in header.split(",")}
        if {"benchmark", "metric", "score"} <= columns:
            scores[path.name] = read_scores(path)
        elif {"llm_params_b", "num_visual_tokens", "score"} <= columns:
            for task, cells in read_grids(path).items():
                name = f"{path.name}, {task}" if task else path.name
                if len(cells) < 5:
                    inputs.left_out[name] = f"{len(cells)} cells, too few for a law of four parameters"
                else:
                    inputs.grids[name] = cells
        elif {"model", "benchmark", "score"} <= columns:
            inputs.models[path.name] = read_models(path)
        else:
            inputs.left_out[path.name] = "no known columns"
        return
    document = read_json(path, None)
    if isinstance(document, dict) and document.get("kind") == "divergence":
        inputs.divergences[path.stem] = DivergenceResult.from_record(document)
    elif isinstance(document, dict) and "scores" in document and "latencies" in document:
        _read_evaluation(path, document, inputs, scores)
    elif isinstance(document, list) and document and {"benchmark", "metric"} <= document[0].keys():
        scores[path.name] = read_scores(path)
    else:
        inputs.left_out[path.name] = "not scores, a divergence or evaluation results"


def _read_evaluation(path: Path, document: dict, inputs: ReportInputs, scores: dict[str, list[ScoreRecord]]) -> None:
    """Scores and latencies of an evaluation; a task that scores zero somewhere has no power law and is left out."""
    records, left_out = evaluation_records(document, path)
    inputs.left_out.update({f"{path.name}, {label}": reason for label, reason in left_out.items()})
    if records:
        scores[path.name] = records
    if document["latencies"]:
        inputs.latencies[path.name] = document["latencies"]


def _score_sections(name: str, fits: list[CurveFit]) -> list[Section]:
    """Fitted curves per group, input kinds against each other, clusters of curves."""
    sections = []
    for group in dict.fromkeys(fit.curve.groups for fit in fits):
        chosen = [fit for fit in fits if fit.curve.groups == group]
        label = ", ".join(value for _, value in group)
        text = "Points, power law c / m^alpha with its bootstrap interval (blue), the law AICc prefers (green, dashed)."
        title = f"Scores against m: {name}" + (f", {label}" if label else "")
        sections.append(Section(title, text, _uri(fitted_curves(chosen)), *_fit_rows(chosen)))
        whole = [fit.curve for fit in chosen if not fit.curve.excluded]
        if len(whole) >= 8:
            clusters = cluster_curves(whole)
            text = "Curves scaled to [0, 1] and grouped by K-means, the mean of each group in bold."
            sections.append(Section(f"Shapes of curves: {name}, {label}", text, _uri(cluster_panels(clusters))))
    kinds = {dict(fit.curve.groups).get("fusion_inputs") for fit in fits}
    if {WITH_QUESTION, WITHOUT_QUESTION} <= kinds:
        curves = [fit.curve for fit in fits]
        effects = input_effects(curves, "fusion_inputs", WITH_QUESTION, WITHOUT_QUESTION)
        image = _uri(input_effect_bars(effects, WITH_QUESTION, WITHOUT_QUESTION))
        sections.append(Section(f"What the question adds: {name}", "Relative difference at equal m.", image))
    return sections


def _fit_rows(fits: list[CurveFit]) -> tuple[list[str], list[list[str]]]:
    header = ["benchmark", "metric", "c", "alpha", "interval of alpha", "R²", "n", "best law", "held-out error"]
    with_verdict = any(fit.curve.errors is not None for fit in fits)
    header += ["standard errors say"] if with_verdict else []
    over_questions = any(fit.power.alpha_question_interval is not None for fit in fits)
    header += ["alpha over questions"] if over_questions else []
    rows = []
    for fit in fits:
        interval = (
            "two points" if fit.power.alpha_interval is None else "{:.3f} … {:.3f}".format(*fit.power.alpha_interval)
        )
        held_out = next((f"{error.rms:.1%}" for error in fit.held_out if error.law == fit.laws[0].law), "none")
        rows.append(
            [
                fit.curve.benchmark,
                fit.curve.metric,
                f"{fit.power.c:.4g}",
                f"{fit.power.alpha:.4f}",
                interval,
                f"{fit.power.r2:.2f}",
                str(fit.power.n),
                fit.laws[0].law.replace("_", "-"),
                held_out,
                *([fit.verdict] if with_verdict else []),
                *([_interval_text(fit.power.alpha_question_interval)] if over_questions else []),
            ]
        )
    return header, rows


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "none" if interval is None else "{:.3f} … {:.3f}".format(*interval)


def _divergence_sections(results: dict[str, DivergenceResult]) -> list[Section]:
    if not results:
        return []
    rows = [
        [
            name,
            str(result.pairs),
            f"{result.psi_eq[-1]:.3f}",
            "none" if result.psi_intra[-1] is None else f"{result.psi_intra[-1]:.3f}",
            "none" if result.psi_ab[-1] is None else f"{result.psi_ab[-1]:.3f}",
            "none" if result.lambda_ is None else f"{result.lambda_:.3g}",
            "none" if result.n_balance is None else f"{result.n_balance:.1f}",
        ]
        for name, result in results.items()
    ]
    header = ["model", "pairs", "ψ_eq", "ψ_intra", "ψ_ab", "λ", "n_balance"]
    bound = "Mean divergence, its deviation over pairs, and the bound fitted by one factor."
    return [
        Section("Divergence and its bound", bound, _uri(bound_against_distance(results)), header, rows),
        Section("Dependency measures", "Mean cosines against n.", _uri(psi_against_n(results))),
        Section("Within and across branches", "Gray: Δ > 0, growth turns linear.", _uri(intra_against_cross(results))),
        Section("Cosines", "Same position: all; other positions: a random sample.", _uri(cosine_histograms(results))),
        Section("Exponent", "alpha(n)/beta between its two limits.", _uri(alpha_against_n(results))),
    ]


def _tradeoff_section(name: str, cells: list[GridCell], fit: TradeoffFit) -> Section:
    rows = [[key, f"{getattr(fit, key):.4f}", "{:.4f} … {:.4f}".format(*fit.intervals[key])] for key in fit.intervals]
    said = () if fit.goodness is None else (f"The standard errors say: {fit.verdict}.",)
    text = " ".join(("error = A / (N^alpha T^beta) + D.", *said, *fit.warnings))
    image = _uri(tradeoff_plot(cells, fit))
    return Section(f"Tokens against parameters: {name}", text, image, ["parameter", "value", "profile interval"], rows)


def _latency_section(name: str, rows: list[dict]) -> Section:
    rows = sorted(rows, key=lambda row: row["num_visual_tokens"])
    series = {
        "first token": [1e3 * row["time_to_first_token"] for row in rows],
        "whole answer": [1e3 * row["seconds_per_answer"] for row in rows],
    }
    image = _uri(latency_against_m([row["num_visual_tokens"] for row in rows], series))
    return Section(f"Latency against m: {name}", "Median over repeats, pixels to text.", image)

"""Draw the README's picture from a real run, `fusedvlm quickstart --compare`: `python docs/write_picture.py FAMILY`.

One scene that no training saw, asked at three m by the family's own weights, and the scores with and without the
question as the run measured them. `docs/pictures/dial.json` holds everything the picture and the README's table
show, and where it is from; the table is printed.
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from fusedvlm import FusedVLMConfig
from fusedvlm.charts import BLUE, LINES, ORANGE, RED, save_figure, token_axis
from fusedvlm.costs.counts import Flops, count_flops, read_shapes
from fusedvlm.costs.profiled_model import paper_config
from fusedvlm.files import read_json, write_json
from fusedvlm.quickstart.world import make_sample
from fusedvlm.serving import VisualChat

PICTURES = Path(__file__).parent / "pictures"
UNSEEN = 2_000_000  # indices from here on are in no training or held-out set
COUNTS = (1, 4, 32)
INK = {"light": ("#1a1a1a", "#ffffff"), "dark": ("#e6e6e6", "#0d1117")}


def main(family: Path) -> None:
    """Ask, collect and draw."""
    facts = collect(family)
    write_json(PICTURES / "dial.json", facts)
    for theme in INK:
        save_figure(draw(facts, theme), PICTURES / f"dial_{theme}.png")


def collect(family: Path) -> dict[str, Any]:
    """Answers of the family's weights about the first unseen scene, and the scores of the run."""
    index = next(number for number in range(UNSEEN, UNSEEN + 100) if make_sample(0, number).is_scene)
    sample = make_sample(0, index)
    sample.image.save(PICTURES / "scene.png")
    questions = sample.cell_question("colour", next(iter(sample.content))), sample.dense_question()
    asked = {question.text: question.answer for question in questions}
    chat = VisualChat(max(family.glob("fusedvlm-m*"), key=lambda path: int(path.name.rpartition("m")[2])))
    answers = {
        question: {m: chat.ask(sample.image, question, num_visual_tokens=m, max_new_tokens=64) for m in COUNTS}
        for question in asked
    }
    comparison = read_json(family / "measured" / "comparison.json")
    curves = {
        name: {key: entrant[key] for key in ("title", "one_word", "dense")} for name, entrant in comparison.items()
    }
    results = read_json(family / "results.json")
    first_token = {str(row["num_visual_tokens"]): row["time_to_first_token"] for row in results["latencies"]}
    return {
        "scene": index,
        "asked": asked,
        "answers": answers,
        "curves": curves,
        "seconds_to_first_token": first_token,
        "flops": paper_flops([int(m) for m in first_token]),
        "measured": results["environment"],
    }


def paper_flops(counts: list[int]) -> dict[str, dict[str, float]]:
    """FLOPs to the first token at the paper's size for 10 views, beside LLaVA-1.5's 576 tokens of one view."""
    shapes = read_shapes(paper_config())
    rows: dict[str, Flops] = {str(m): count_flops(shapes, m) for m in [*counts, 256, 768]}
    dense = FusedVLMConfig(connector="dense", max_local_views=0)
    rows["LLaVA-1.5"] = count_flops(read_shapes(dense), dense.num_visual_tokens, num_views=1)
    return {name: row.record() for name, row in rows.items()}


def table(facts: dict[str, Any]) -> list[str]:
    """The README's table: what a visual token buys, and what it costs."""
    curves, lines = facts["curves"]["question"], []
    for name, flops in facts["flops"].items():
        if name in curves["one_word"]:
            scores = [_decimal(curves[key][name]) for key in ("one_word", "dense")]
            scores.append(f"{1000 * facts['seconds_to_first_token'][name]:.0f} ms")
        else:
            scores = ["", "", ""]
        cells = [name if name.isdigit() else f"{name}: 576", *scores]
        cells += [f"{flops[part] / 1e12:.2f}" for part in ("prefill", "first_token")]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return lines


def _decimal(score: float) -> str:
    return f"{score:.3f}".removeprefix("0")


def draw(facts: dict[str, Any], theme: str) -> Figure:
    """Scene and answers on the left, both figures of scores on the right."""
    ink, paper = INK[theme]
    figure = Figure(figsize=(13, 4.4), layout="constrained", facecolor=paper)
    scene, text, one_word, dense = figure.subplots(1, 4, width_ratios=[1.1, 1.7, 1.6, 1.6])
    _show_scene(scene, ink)
    _show_answers(text, facts, ink)
    for axes, key, title in (
        (one_word, "one_word", "one word (color, shape, letter)"),
        (dense, "dense", "list all, read all"),
    ):
        _show_curves(axes, facts["curves"], key, title, ink, paper)
    handles, labels = one_word.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3, frameon=False, labelcolor=ink, fontsize=9)
    return figure


def _show_scene(axes: Any, ink: str) -> None:
    axes.imshow(Image.open(PICTURES / "scene.png"), interpolation="nearest")
    axes.set_xticks([8, 24, 40, 56], ["1", "2", "3", "4"])
    axes.set_yticks([8, 24, 40, 56], ["a", "b", "c", "d"])
    axes.tick_params(length=0, colors=ink)
    axes.set_title("a scene nobody trained on", color=ink, fontsize=10)


def _show_answers(axes: Any, facts: dict[str, Any], ink: str) -> None:
    axes.axis("off")
    lines = []
    for question, by_m in facts["answers"].items():
        lines.append(question)
        for m, answer in by_m.items():
            said = textwrap.shorten(answer, 140, placeholder=" ...")
            first, *rest = textwrap.wrap(said, 36) or [""]
            lines += [f"  m = {m:<3} {first}", *(f"          {line}" for line in rest)]
        lines.append("")
    axes.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8, color=ink, transform=axes.transAxes)


def _show_curves(axes: Any, curves: dict[str, Any], key: str, title: str, ink: str, paper: str) -> None:
    axes.set_facecolor(paper)
    for entrant, color, marker, line in zip(curves.values(), (BLUE, ORANGE, RED), "osD", LINES, strict=False):
        scores = {int(m): score for m, score in entrant[key].items()}
        axes.plot(
            list(scores), list(scores.values()), color=color, marker=marker, linestyle=line, label=entrant["title"]
        )
    token_axis(axes, scores)
    axes.set_ylim(0, 1.03)
    axes.set_title(title, color=ink, fontsize=10)
    axes.set_ylabel("mean score", color=ink)
    axes.xaxis.label.set_color(ink)
    axes.tick_params(colors=ink)
    for spine in axes.spines.values():
        spine.set_color(ink)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    facts = read_json(PICTURES / "dial.json")
    print(json.dumps(facts["answers"], indent=1), *table(facts), sep="\n")  # noqa: T201

"""Cards say what their facts say, whatever the facts are."""

import dataclasses
import html
import re
import socket

import matplotlib
import pytest
import yaml
from hypothesis import given, settings, strategies as st

from fusedvlm.evaluation import EvaluationResults, TaskScore
from fusedvlm.hub_cards.card.card_plots import latency_plot, score_plot
from fusedvlm.hub_cards.card.lint_card import lint_card
from fusedvlm.hub_cards.card.readback import differences, read_back
from fusedvlm.hub_cards.card.render_card import cell, prose, render_card
from fusedvlm.hub_cards.facts import Benchmark, Dataset, StatedFacts
from fusedvlm.hub_cards.release.release_files import evidence_files
from fusedvlm.tests.hub_cards.tiny_family import results

NASTY = [
    "a | b", "two\nlines", "{{ facts }}", "{% raw %}", "---", "<script>alert(1)</script>", "**bold** `code`", "# heading",
    "![x](http://evil)", "a\n---\nlicense: mit\n---\n", "\\", "&amp;", "```\nfence", "$x$", "ünïcode ✓", "| | |\n|---|---|", "~~~",
]  # fmt: skip


@pytest.fixture(scope="module")
def facts(tiny_release):
    return tiny_release.facts


@pytest.fixture(scope="module")
def sizes(tiny_release):
    from fusedvlm.hub_cards.release.run_facts import content_size

    return {name: content_size(content) for name, content in tiny_release.files.items()}


def test_rendering_needs_no_network_and_no_clock(facts, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr("time.time", refuse)
    assert render_card(facts) == render_card(facts)


def test_what_a_card_shows_reads_back(facts):
    shown = read_back(render_card(facts))
    assert shown.title == "tiny-m7, m = 7"
    assert shown.current == ["7"]
    assert [row["m"] for row in shown.family] == ["1", "7", "12"]
    assert shown.family[0]["repository"] == "ada/tiny-m1"
    assert shown.family[1]["reading"] == "0.322 ± 0.017"
    assert shown.family[1]["mean"] == "0.347"
    assert shown.family[1]["mean, images swapped"] == "0.173"
    assert shown.family[1]["first token, ms"] == "20.1"
    assert shown.glance["Trained with m"] == "1, 7, 12"
    scores = {r["dataset"]["name"]: r["metrics"][0]["value"] for r in shown.metadata["model-index"][0]["results"]}
    assert scores == {row.task: row.score for row in results().scores if row.num_visual_tokens == 7}


def test_a_card_passes_the_lint(facts, sizes):
    assert lint_card(render_card(facts), sizes, facts.repo_id) == []


def test_every_number_of_the_tables_and_the_metadata_is_compared(facts):
    """Changing any one number there is noticed."""
    text = render_card(facts)
    head, body = text.split("\n---\n", 1)
    glance = body.index("## At a glance"), body.index("## Use it")
    family = body.index("| m |"), body.index("![Score")
    spots = [(match.start(), match.end()) for match in re.finditer(r"\d+(\.\d+)?", head)]
    offset = len(head) + len("\n---\n")
    for start, end in (glance, family):
        part = re.sub(r"\]\([^)]*\)", lambda match: " " * len(match.group()), body[start:end])  # addresses: other tests
        spots += [(offset + start + m.start(), offset + start + m.end()) for m in re.finditer(r"\d+(\.\d+)?", part)]
    assert len(spots) > 60
    unnoticed = []
    for start, end in spots:
        digit = text[end - 1]
        changed = text[: end - 1] + ("3" if digit != "3" else "7") + text[end:]
        if not differences(changed, facts):
            unnoticed.append(text[max(0, start - 20) : end + 5])
    assert unnoticed == []


def test_a_dash_in_the_place_of_a_number_is_noticed_and_the_reverse(facts):
    text = render_card(facts)
    assert differences(text.replace("| 0.347 |", "| — |", 1), facts)
    assert differences(text.replace("| 0.347 |", "| 0 |", 1), facts)  # too few digits to say anything
    bare = dataclasses.replace(facts, control=None)
    assert differences(render_card(bare).replace("| — |", "| 0.000 |", 1), bare)


def test_links_of_the_family_go_where_they_say(facts):
    text = render_card(facts)
    for neighbor in facts.family:
        assert f"[{neighbor.repo_id}](https://huggingface.co/{neighbor.repo_id})" in text
    assert differences(
        text.replace("](https://huggingface.co/ada/tiny-m1)", "](https://huggingface.co/eve/tiny-m1)"), facts
    )


def test_missing_facts_are_shown_as_missing(facts):
    bare = dataclasses.replace(
        facts, measured=None, control=None, training=None, stated=StatedFacts(license=None, llm_license=None), files=()
    )
    text = render_card(bare)
    shown = read_back(text)
    assert shown.glance["License"].startswith("—")
    assert shown.glance["Mean score"] == shown.glance["Time to first token"] == "—"
    assert all(row["mean"] == "—" for row in shown.family)
    assert "model-index" not in shown.metadata
    assert "license" not in shown.metadata
    assert "Nobody has stated the license" in text
    assert "Not measured." in text
    assert "Training data: not stated." in text
    assert not re.search(r"\| 0(\.0+)? \|", text)
    assert "![" not in text
    assert score_plot(bare) is None
    assert latency_plot(bare) is None


def test_an_m_that_was_not_measured_gets_dashes(facts):
    scores = [row for row in facts.measured.scores if row.num_visual_tokens != 7]
    partial = dataclasses.replace(facts, measured=EvaluationResults(facts.measured.environment, scores, []))
    shown = read_back(render_card(partial))
    assert shown.glance["Mean score"] == "—"
    assert set(shown.family[1].values()) == {"7", "ada/tiny-m7", "—", "0.173"}
    assert "model-index" not in shown.metadata


@pytest.mark.parametrize("text", NASTY)
def test_no_fact_breaks_the_card(facts, sizes, text):
    stated = dataclasses.replace(
        facts.stated,
        datasets=(Dataset(name=text, license=text), Dataset(name="b", id="org/data")),
        intended_use=text,
        out_of_scope=text,
        limitations=text,
        evaluation_notes=text,
        citation=text,
        vision_license=text,
    )
    measured = results()
    measured.scores = [dataclasses.replace(row, task=row.task.replace("reading", text)) for row in measured.scores]
    environment = dataclasses.replace(measured.environment, command=text, hardware=text, versions={text: text})
    nasty = dataclasses.replace(
        facts,
        stated=stated,
        measured=dataclasses.replace(measured, environment=environment),
        training={"settings": {text: text}, "stages": {text: 1}},
        counted=dataclasses.replace(facts.counted, vision=dataclasses.replace(facts.counted.vision, license=text)),
    )
    card = render_card(nasty)
    assert lint_card(card, sizes, facts.repo_id) == []
    shown = read_back(card)
    assert shown.glance["License"] == "mit"
    assert [row["m"] for row in shown.family] == ["1", "7", "12"]
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    plain = re.sub(r"^(`{3,}).*?^\1$", "", card.split("\n---\n", 1)[1], flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in plain
    headings = [line for line in plain.splitlines() if re.match(r"#{1,6} ", line)]
    assert headings == [
        line
        for line in re.sub(r"^(`{3,}).*?^\1$", "", render_card(facts).split("\n---\n", 1)[1], flags=re.MULTILINE | re.DOTALL).splitlines()
        if re.match(r"#{1,6} ", line)
    ]  # fmt: skip
    assert score_plot(nasty).startswith(b"\x89PNG")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_a_cell_is_one_cell_and_reads_back(text):
    escaped = cell(text)
    assert "|" not in escaped
    assert len(escaped.splitlines()) <= 1
    assert html.unescape(escaped) == " ".join(text.split())


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab -#|`~=_*<>{}&\n\t"))
def test_prose_starts_no_block(text):
    escaped = prose(text)
    assert "<" not in escaped
    assert "{" not in escaped
    for line in escaped.splitlines():
        assert not re.match(r"\s*(#|\||`|~|=|>)", line)
        assert not re.fullmatch(r"\s*(-{2,}|_{3,}|\*{3,})\s*", line)


def test_registered_benchmarks_get_a_result_file(facts):
    stated = dataclasses.replace(facts.stated, benchmarks={"reading": Benchmark("org/bench", "read", "accuracy")})
    stated_facts = dataclasses.replace(facts, stated=stated)
    files = evidence_files(stated_facts)
    (entry,) = yaml.safe_load(files[".eval_results/org--bench--read.yaml"])
    assert entry["dataset"] == {"id": "org/bench", "task_id": "read"}
    assert entry["value"] == results().scores[2].score
    assert "m = 7" in entry["notes"]
    assert not any(name.startswith(".eval_results") for name in evidence_files(facts))
    shown = read_back(render_card(stated_facts)).metadata["model-index"][0]["results"]
    assert [r["dataset"]["type"] for r in shown] == ["counting", "org/bench"]


def test_tasks_that_look_alike_stay_apart(facts):
    scores = [TaskScore(task, 7, 0.1 * n, 9, 0.0) for n, task in enumerate(["a b", "a-b", "a_b"], start=1)]
    alike = dataclasses.replace(facts, measured=dataclasses.replace(facts.measured, scores=scores), control=None)
    shown = read_back(render_card(alike)).metadata["model-index"][0]["results"]
    assert {r["dataset"]["name"]: r["metrics"][0]["value"] for r in shown} == {s.task: s.score for s in scores}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: mit", "licence: mit", "'licence' is not a key"),
        ("license: mit", "license: MIT License", "not one of the Hub's"),
        ("license: mit", "license: [mit, apache-2.0]", "not one of the Hub's"),
        ("pipeline_tag: image-text-to-text", "pipeline_tag: nonsense", "pipeline_tag"),
        ("library_name: transformers", "library_name: fusedvlm", "library_name"),
        ("- custom_code\n", "- custom_code\ndatasets:\n- /data/x\n", "datasets '/data/x'"),
        ("plots/score_vs_m.png", "plots/nowhere.png", "plots/nowhere.png, which is not there"),
        ("![Milliseconds per question", "![](plots/score_vs_m.png) ![Milliseconds per question", "no alternative text"),
        ("## License", "More information needed\n\n## License", "left over"),
        ("## License", "see /home/me/notes\n\n## License", "left over"),
        ("## License", "{{ license }}\n\n## License", "left over"),
        ("| seed | 3 |", "| seed | 3 | 4 |", "different length"),
        ("answer = ask(", "answer = = ask(", "does not compile"),
        ('repo, revision = "ada/tiny-m7"', 'repo, revision = "eve/tiny-m7"', "loads 'eve/tiny-m7'"),
    ],
)
def test_the_lint_notices(facts, sizes, old, new, message):
    text = render_card(facts)
    assert text.count(old)
    found = lint_card(text.replace(old, new, 1), sizes, facts.repo_id)
    assert any(message in what for what in found), found


def test_plots_are_small_opaque_and_carry_no_traces(tiny_release):
    from io import BytesIO

    from PIL import Image

    for name in ("plots/score_vs_m.png", "plots/latency_vs_m.png"):
        content = tiny_release.files[name]
        assert len(content) < 200_000
        image = Image.open(BytesIO(content))
        assert image.text == {"Software": f"matplotlib {matplotlib.__version__}"}
        assert image.convert("RGBA").getextrema()[3] == (255, 255)

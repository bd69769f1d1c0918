"""Every command end to end: JSON alone on standard output, content of documents, resuming, several processes, refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from typer.testing import CliRunner

from fusedvlm.scaling.cli import app, plan
from fusedvlm.tests.phone import assert_fits_a_phone
from fusedvlm.tests.processes import run_program
from fusedvlm.tests.tiny import build_model, build_tiny_processor, text_tokenizer

ROOT = typer.Typer(pretty_exceptions_enable=False)
ROOT.add_typer(app, name="scaling")
ROOT.command()(plan)
WORDS = [
    "a",
    "red",
    "cat",
    "sleeps",
    "on",
    "the",
    "sofa",
    "yes",
    "no",
    "maybe",
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
]


def invoke(*arguments):
    return CliRunner().invoke(ROOT, [str(argument) for argument in arguments])


def document(*arguments):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def error(*arguments):
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


@pytest.fixture(autouse=True)
def fresh_process_state():
    """accelerate keeps the device of its first use for the rest of the process."""
    yield
    from accelerate import PartialState

    PartialState._reset_state()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny random Llama with a tokenizer, saved as any causal LM is."""
    folder = tmp_path_factory.mktemp("lm")
    set_seed(0)
    tokenizer = text_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    generator = np.random.default_rng(0)

    def text(n):
        return " ".join(generator.choice(WORDS, n))

    rows = [{"system": "s", "question": text(4), "chosen": text(5 + i % 3), "rejected": text(6)} for i in range(10)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def measure(language_model, pairs):
    return (
        "scaling",
        "divergence",
        "--model",
        language_model,
        "--dataset",
        pairs,
        "--device",
        "cpu",
        "--max-tokens",
        8,
    )


def test_fit_of_the_papers_scores():
    found = document("scaling", "fit", "paper", "--resamples", 50)
    assert len(found["fits"]) == 78
    record = next(
        fit
        for fit in found["fits"]
        if (fit["benchmark"], fit["metric"], fit["fusion_inputs"]) == ("POPE", "Overall", "vision+question+queries")
    )
    assert record["c"] == pytest.approx(65.197, abs=5e-4)
    assert record["alpha"] == pytest.approx(-0.0503, abs=5e-5)
    assert record["alpha_interval"][0] < record["alpha"] < record["alpha_interval"][1]
    assert (record["n"], round(record["r2"], 3)) == (10, 0.779)


def test_fit_prints_a_table_and_leaves_out_points(tmp_path):
    path = tmp_path / "results.csv"
    rows = "".join(f"A,acc,{m},{10 * m**0.5}\n" for m in (1, 4, 16, 64)) + "A,acc,256,1\n"
    path.write_text("benchmark,metric,m,score\n" + rows)
    result = invoke("scaling", "fit", path, "--exclude", "m=256", "--plot", tmp_path / "curves.png")
    assert result.exit_code == 0
    assert Image.open(tmp_path / "curves.png").size[0] > 300
    line = result.stdout.splitlines()[1].split()
    assert line[:3] == ["A/acc", "10.000", "-0.5000"]
    assert "-0.5000" not in invoke("scaling", "fit", path).stdout


def test_fit_refuses_bad_rows(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("benchmark,metric,m,score\nA,acc,1,2\nA,acc,1,3\n")
    assert error("scaling", "fit", path).endswith("row 3: duplicate of row 2 (A/acc at m=1).")


def test_divergence_of_a_saved_model(measure, language_model, pairs, tmp_path):
    found = document(*measure, "--beta", 0.4, "--output", tmp_path / "out" / "d.json", "--plot", tmp_path / "d.png")
    assert found == json.loads((tmp_path / "out" / "d.json").read_text())
    assert (found["pairs"], found["count"][0], found["skipped"]) == (10, 10, 0)
    assert found["psi_ab"][0] is None
    assert found["upsilon"][0] == pytest.approx(1 - found["psi_eq"][0])
    assert found["lambda"] > 0
    assert (tmp_path / "d.png").exists()
    # The numbers are those of plain forward passes over whole sequences.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusedvlm.scaling.divergence.estimators import pair_curves

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(language_model),
        AutoTokenizer.from_pretrained(language_model),
    )
    distances = []
    for row in map(json.loads, pairs.read_text().splitlines()):
        messages = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["question"]}]
        prefix = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        states = []
        for answer in (row["chosen"], row["rejected"]):
            ids = torch.tensor([prefix + tokenizer(answer, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                states.append(model.model(ids).last_hidden_state[0, len(prefix) :][:8].numpy())
        length = min(map(len, states))
        distances.append(pair_curves(states[0][:length], states[1][:length])["distance"])
    assert found["mean_distance"][4] == pytest.approx(np.mean([d[4] for d in distances]), rel=1e-4)


def test_divergence_continues_from_its_state(measure, tmp_path):
    whole = document(*measure)
    state = tmp_path / "state.npz"
    assert document(*measure, "--limit", 4, "--state", state)["pairs"] == 4
    assert document(*measure, "--limit", 10, "--state", state) == whole
    assert "holds 10 rows; --limit 3" in error(*measure, "--limit", 3, "--state", state)
    assert "belongs to another measurement" in error(*measure, "--batch-size", 5, "--state", state)


def test_two_processes_measure_the_same(measure, tmp_path):
    runner = tmp_path / "run.py"
    runner.write_text("from fusedvlm.scaling.cli import app\napp()\n")
    arguments = [str(a) for a in measure[1:]] + ["--json", "--state", str(tmp_path / "s.npz")]
    shared, alone = json.loads("".join(rank.stdout for rank in run_program(2, runner, *arguments))), document(*measure)
    assert (tmp_path / "s.0of2.npz").exists()
    assert shared["pairs"] == alone["pairs"] == 10
    for name in ("mean_distance", "std_distance", "psi_eq", "upsilon", "alpha"):
        np.testing.assert_allclose(shared[name], alone[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert shared["histograms"]["psi_eq"] == pytest.approx(alone["histograms"]["psi_eq"], abs=1)


def test_divergence_of_image_pairs(tmp_path):
    folder = tmp_path / "variant"
    model = build_model(tmp_path)
    model.save_pretrained(folder)
    processor = build_tiny_processor(model)
    processor.save_pretrained(folder)
    generator = np.random.default_rng(0)
    rows = []
    for i in range(3):
        for side in "ab":
            Image.fromarray(generator.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}{side}.png")
        rows.append({"image_a": f"{i}a.png", "image_b": f"{i}b.png", "question": "what is in the image?"})
    rows.append({**rows[0], "image_b": rows[0]["image_a"]})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("scaling", "divergence", "--model", folder, "--dataset", path, "--device", "cpu", "--batch-size", 3)
    found = document(*command, "--max-tokens", 7)
    assert found["images"] is True
    assert found["count"] == [4] * 7
    # By hand: the LLM's states at the placeholders of each image, one prompt at a time.
    import torch

    distances = []
    for row in rows:
        states = []
        for name in ("image_a", "image_b"):
            message = {
                "role": "user",
                "content": [
                    {"type": "image", "image": str(tmp_path / row[name])},
                    {"type": "text", "text": row["question"]},
                ],
            }
            inputs = processor.apply_chat_template(
                [[message]],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
                processor_kwargs={"num_visual_tokens": 7},
            )
            with torch.no_grad():
                hidden = model.model(**inputs).last_hidden_state
            states.append(hidden[inputs["input_ids"] == model.config.image_token_id])
        distances.append(float((states[0] - states[1]).sum(0).norm()))
    assert distances[3] == pytest.approx(0, abs=1e-4)
    assert found["mean_distance"][-1] == pytest.approx(np.mean(distances), rel=1e-3)
    assert document(*command, "--max-tokens", 800)["count"] == [4] * 12  # the largest trained m


def test_divergence_names_what_is_wrong(measure, language_model, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"question": "q", "chosen": "", "rejected": "x"}) + "\n")
    assert "none of them a pair with tokens" in error(*measure[:5], empty, *measure[6:])
    assert "Unknown dtype 'float3'" in error(*measure, "--dtype", "float3")
    assert "Unknown reading 'max'" in error(*measure, "--reading", "max")


def test_optimal_on_the_published_grid(tmp_path):
    found = document("scaling", "optimal", "--text-tokens", 50, "--budget", "1 TFLOPs", "--plot", tmp_path / "t.png")
    assert found["optimal_visual_tokens"] == 14
    assert found["fit"]["squared_error"] == pytest.approx(3.79e-4, rel=2e-3)
    assert found["choices"][0]["llm_params_b"] == 7
    assert document("scaling", "optimal")["optimal_visual_tokens"] == 1
    assert "Warning: D=0 is at its lower bound" in invoke("scaling", "optimal").stderr
    assert "is a time" in error("scaling", "optimal", "--budget", "3 ms")


def test_plan_with_counted_and_measured_costs(tmp_path):
    found = document("plan", "--budget", "2 TFLOPs", "--task", "ocr", "--resamples", 20)
    assert found["best"]["num_visual_tokens"] == 64
    assert found["best"]["cost"] < 2 < found["dearer"]["cost"]
    assert set(found["best"]["predicted"]) == {
        "OCRBench/Final Score",
        "OCRVQA_TESTCORE/Overall",
        "TextVQA_VAL/Overall",
        "ChartQA_TEST/Overall",
    }
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps([{"num_visual_tokens": m, "latency_ms": 100 + m / 4} for m in (1, 64, 256, 768)]))
    by_time = document("plan", "--budget", "150 ms", "--task", "caption", "--costs", costs, "--resamples", 20)
    assert by_time["best"]["num_visual_tokens"] == 64
    assert by_time["dearer"]["num_visual_tokens"] == 256
    text = invoke("plan", "--budget", "150 ms", "--task", "caption", "--costs", costs, "--resamples", 20).stdout
    assert "choose  m = 64: 116 ms" in text
    assert "needs --costs" in error("plan", "--budget", "150 ms")
    assert "Unknown scope" in error("plan", "--budget", "2 TFLOPs", "--scope", "everything")


def test_report_of_a_folder(measure, tmp_path):
    document(*measure, "--output", tmp_path / "tiny.json")
    rows = "".join(f"A,acc,{m},{10 * m**0.3}\nB,acc,{m},{20 + m}\n" for m in (1, 4, 16, 64))
    (tmp_path / "scores.csv").write_text("benchmark,metric,m,score\n" + rows)
    (tmp_path / "models.csv").write_text("model,benchmark,score\nA,x,1\nA,y,2\nA,z,3\nB,x,2\nB,y,2\nB,z,1\n")
    (tmp_path / "grid.csv").write_text(
        "llm_params_b,num_visual_tokens,score\n"
        + "".join(f"{n},{v},{1 - 0.6 * n**-0.1 * v**-0.05}\n" for n in (1, 7) for v in (1, 8, 64))
    )
    results = {
        "environment": {},
        "scores": [
            {"task": "read", "num_visual_tokens": m, "score": m / 10, "count": 9, "standard_error": 0.1}
            for m in (1, 2, 4)
        ]
        + [{"task": "never", "num_visual_tokens": m, "score": 0.0, "count": 9, "standard_error": 0.0} for m in (1, 2)],
        "latencies": [
            {"num_visual_tokens": m, "time_to_first_token": 0.1, "seconds_per_answer": 0.2, "count": 3} for m in (1, 2)
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "notes.json").write_text('{"a": 1}')
    found = document("scaling", "report", tmp_path, "--resamples", 50, "--exclude", "benchmark=B,m=64")
    assert found["left_out"] == {
        "notes.json": "not scores, a divergence or evaluation results",
        "results.json, never": "a score of zero, which no power law fits",
    }
    fits = {(fit["source"], fit["benchmark"]): fit for fit in found["fits"]}
    assert fits["scores.csv", "A"]["alpha"] == pytest.approx(-0.3)
    assert fits["scores.csv", "B"]["excluded_m"] == [64]
    assert ("results.json", "read") in fits
    page = (tmp_path / "scaling.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == len(found["sections"]) == 10
    for title in (
        "Scores against m: scores.csv",
        "Divergence and its bound",
        "Cosines",
        "Tokens against parameters: grid.csv",
        "Models: models.csv",
        "Latency against m: results.json",
        "Left out",
    ):
        assert title in page
    assert "http" not in page
    assert_fits_a_phone(tmp_path / "scaling.html", tmp_path / "phone")
    assert "matches no point" in error("scaling", "report", tmp_path, "--exclude", "benchmark=C")
    (tmp_path / "nothing").mkdir()
    assert "nothing to report" in error("scaling", "report", tmp_path / "nothing")


def test_help_teaches_and_imports_nothing_heavy():
    for command in (["scaling"], ["scaling", "fit"], ["scaling", "divergence"], ["scaling", "optimal"], ["plan"]):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert command == ["scaling"] or "fusedvlm" in result.stdout
    code = "import sys, fusedvlm.scaling.cli; print([m for m in ('torch', 'transformers', 'scipy', 'matplotlib') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"

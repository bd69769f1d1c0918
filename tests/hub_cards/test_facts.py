"""Stated, measured and counted facts: where they come from, and what is refused."""

import dataclasses
import json
import shutil

import pytest

from fusedvlm.evaluation import EvaluationResults
from fusedvlm.hub_cards.check.repository_check import check_files
from fusedvlm.hub_cards.facts import CardFacts, Dataset, Neighbor, StatedFacts, find_stated, mean_scores, read_stated
from fusedvlm.hub_cards.release.run_facts import read_results, read_run, without_folders
from fusedvlm.hub_cards.release.variant_release import build_family, build_release, find_variants
from fusedvlm.tests.hub_cards.tiny_family import COMMIT, COUNTS, results, save_variant, write_family

STATED = StatedFacts(license="mit", llm_license=None)


def test_facts_survive_json(tiny_release):
    text = tiny_release.facts.to_json()
    again = CardFacts.from_json(text)
    assert again == dataclasses.replace(tiny_release.facts, training=again.training)
    assert again.to_json() == text
    assert again.measured.scores == results().scores


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"repo_id": "a/b"}', "null"])
def test_facts_that_are_none_are_refused(broken):
    with pytest.raises(ValueError, match=r"facts\.json"):
        CardFacts.from_json(broken)


def test_measured_facts_carry_where_they_come_from(tiny_release):
    environment = tiny_release.facts.measured.environment
    assert environment.command == "fusedvlm quickstart --seed 3"
    assert (environment.date, environment.hardware) == ("2026-02-03", "a test")
    assert environment.versions == {"torch": "2.9", "python": "3.12"}


def test_counted_facts_follow_from_the_files(tiny_release, model):
    counted = tiny_release.facts.counted
    assert (counted.num_visual_tokens, counted.trained_num_visual_tokens) == (7, COUNTS)
    assert sum(counted.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counted.weight_bytes == tiny_release.files["model.safetensors"].stat().st_size
    assert counted.self_contained
    assert counted.language_model.repo is None


def test_the_license_has_no_default(tiny_family):
    with pytest.raises(ValueError, match=r"no default.*facts\.yaml.*--license"):
        build_family(tiny_family, "ada")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("licence: mit", "unknown key 'licence'"),
        ("license: [mit]", "license must be text"),
        ("- mit", "must hold keys and values"),
        ("license: {", "not YAML"),
        ("license: mit\nlicense: apache-2.0", "'license' is stated twice"),
        ("languages: en", "languages must be a list"),
        ("license_files: LICENSE", "license_files must be a list"),
        ("datasets: [{title: x}]", "unknown key 'title'"),
        ("datasets: [{name: x, id: /data/x}]", "is not a Hub id"),
        ("datasets: [{name: x, url: 'javascript:alert(1)'}]", "must start with https://"),
        ("benchmarks: {gqa: {id: a/b}}", "task_id"),
        ("benchmarks: {gqa: {id: a/b, task_id: ../../x}}", "not a Hub id"),
        ("license: 3", "license must be text"),
    ],
)
def test_misstated_facts_name_the_file(tmp_path, text, message):
    path = tmp_path / "facts.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_stated(path)
    assert str(path) in str(error.value) or str(error.value).startswith(("Dataset", "Benchmark"))


def test_facts_beside_the_variant_and_options_over_them(tmp_path):
    variant = tmp_path / "family" / "variant"
    variant.mkdir(parents=True)
    assert find_stated(variant).license is None
    (variant.parent / "facts.yaml").write_text("license: mit\nintended_use: research\nlicense_files: [TERMS.txt]\n")
    assert find_stated(variant).license_files == (str(variant.parent / "TERMS.txt"),)
    assert find_stated(variant, license="gpl-3.0", llm_license=None).license == "gpl-3.0"
    assert find_stated(variant, license="gpl-3.0").intended_use == "research"
    (variant / "facts.yaml").write_text("license: apache-2.0\n")
    assert find_stated(variant).license == "apache-2.0"
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        find_stated(variant, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["scores"][0].update(score=float("nan")), "score is nan, which is no number"),
        (lambda data: data["scores"].append(data["scores"][0]), "two scores at m=1"),
        (lambda data: data["latencies"][0].update(time_to_first_token=-1), "latency at m=1"),
        (lambda data: data["scores"][0].update(task="mean"), "'mean' cannot be the name of a task"),
        (lambda data: data["scores"][0].update(task="reading "), "'reading' cannot be the name of a task"),
        (lambda data: data["scores"][0].update(task=" "), "'' cannot be the name of a task"),
        (lambda data: data.pop("environment"), "environment is missing"),
        (lambda data: data["scores"][0].pop("count"), r"scores\[0\]: count is missing"),
        (lambda data: data["scores"][0].update(score="high"), "score must be a number, not 'high'"),
        (lambda data: data["scores"][0].update(count=True), "count must be a whole number"),
    ],
)
def test_damaged_results_are_refused(tmp_path, change, message):
    path = tmp_path / "results.json"
    results().save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "variant", "results.json")


def test_results_of_the_family_win_over_a_copy_inside(tmp_path):
    (tmp_path / "variant").mkdir()
    results(0.5).save(tmp_path / "variant" / "results.json")
    assert read_results(tmp_path / "variant", "results.json") == results(0.5)
    results().save(tmp_path / "results.json")
    assert read_results(tmp_path / "variant", "results.json") == results()


def test_folders_of_this_machine_stay_here(tmp_path):
    measured = results()
    environment = dataclasses.replace(measured.environment, command="fusedvlm quickstart --output /home/me/runs/mine")
    dataclasses.replace(measured, environment=environment).save(tmp_path / "results.json")
    found = read_results(tmp_path / "variant", "results.json")
    assert found.environment.command == "fusedvlm quickstart --output .../mine"
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"output": "/scratch/me/x", "lr": 0.1}}))
    assert read_run(tmp_path / "variant")["settings"] == {"output": ".../x", "lr": 0.1}
    assert without_folders("a/b and 3/4 at https://x.org/a/b") == "a/b and 3/4 at https://x.org/a/b"


def test_the_record_of_a_training_run(tmp_path, tiny_family):
    """What the trainers write into a finished model's folder."""
    record = {
        "format": 1, "stage": "generation", "recipe": {"training": {"learning_rate": 1e-3}}, "source": "r.yaml",
        "versions": {"torch": "2.9"}, "processes": 2, "command": "fusedvlm train /home/me/r.yaml",
        "started": "2026-02-03T04:05:06+00:00", "data": {"samples": 12, "sources": ["/data/me/train.json"]}, "finished": None,
    }  # fmt: skip
    shutil.copytree(tiny_family / "tiny-m7", tmp_path / "v")
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"seed": 99}}))
    (tmp_path / "v" / "run.json").write_text(json.dumps(record))
    release = build_release(tmp_path / "v", "ada/x", stated=STATED)
    manifest = json.loads(release.files["training/data.json"])
    assert manifest["recorded"] == {"samples": 12, "sources": [".../train.json"]}
    config = json.loads(release.files["training/config.json"])
    assert config["settings"] == {"training": {"learning_rate": 1e-3}}
    assert (config["command"], config["versions"]) == ("fusedvlm train .../r.yaml", {"torch": "2.9"})
    card = release.files["README.md"].decode()
    assert "| training.learning_rate | 0.001 |" in card
    assert "| versions.torch | 2.9 |" in card
    assert release.facts.measured is None
    assert check_files(release.files) == []


def test_means_only_where_every_task_was_measured():
    measured = results()
    assert mean_scores(measured)[7] == pytest.approx((0.1 + 0.05 + 0.1) / 2 + 0.0317 * 7)
    partial = EvaluationResults(measured.environment, measured.scores[1:], [])
    assert list(mean_scores(partial)) == [7, 12]
    assert mean_scores(None) == {}


def test_variants_in_the_order_of_m(tiny_family, tmp_path):
    assert [path.name for path in find_variants(tiny_family)] == ["tiny-m1", "tiny-m7", "tiny-m12"]
    assert find_variants(tiny_family / "tiny-m7") == [tiny_family / "tiny-m7"]
    with pytest.raises(ValueError, match="neither a variant"):
        find_variants(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_variants(tmp_path / "nowhere")


def test_checkpoints_of_other_kinds_are_no_variants(tiny_family, model, tmp_path):
    folder = tmp_path / "family"
    for m in (1, 7):
        (folder / f"m{m}").mkdir(parents=True)
        (folder / f"m{m}" / "config.json").write_text((tiny_family / f"tiny-m{m}" / "config.json").read_text())
    for name, change in (
        ("stage1", {"architectures": ["FusedVLMForContrastiveLearning"]}),
        ("llm", {"model_type": "llama"}),
    ):
        (folder / name).mkdir()
        config = json.loads((tiny_family / "tiny-m1" / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | change))
    assert [path.name for path in find_variants(folder)] == ["m1", "m7"]
    (folder / "again").mkdir()
    (folder / "again" / "config.json").write_text((folder / "m7" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"again.*m7.*both have m=7"):
        find_variants(folder)


def test_names_that_the_hub_refuses(tiny_family):
    for repo_id in ("no-slash", "a/b--c", "a/" + "x" * 120, "../x"):
        with pytest.raises(ValueError, match="repository"):
            build_release(tiny_family / "tiny-m7", repo_id, stated=STATED)
    with pytest.raises(ValueError, match="cannot be a tag"):
        build_release(tiny_family / "tiny-m7", "ada/x", tag="two words", stated=STATED)


def test_a_family_that_lacks_the_variant_is_refused(tiny_family):
    with pytest.raises(ValueError, match="family given"):
        build_release(tiny_family / "tiny-m7", "ada/x", family=[Neighbor(1, "ada/y")], stated=STATED)


def test_same_inputs_same_bytes(tiny_family):
    first, second = (build_family(tiny_family, "ada", license="mit")[2].files for _ in range(2))
    assert list(first) == list(second)
    for name, content in first.items():
        assert content == second[name], name


def test_a_model_by_reference_is_pinned_and_its_terms_travel(tmp_path):
    folder = write_family(tmp_path / "family", text="meta-llama/Llama-2-7b-hf")
    with pytest.raises(ValueError, match="llm_license: llama2"):
        build_family(folder, "ada", license="llama2")
    with pytest.raises(ValueError, match="state `license: llama2`"):
        build_family(folder, "ada", license="mit", llm_license="llama2")
    with pytest.raises(ValueError, match=r"copy of its text.*--license-file"):
        build_family(folder, "ada", license="llama2", llm_license="llama2")
    wrong, right = tmp_path / "wrong.txt", tmp_path / "agreement.txt"
    wrong.write_text("MIT License")
    right.write_text("LLAMA 2 COMMUNITY LICENSE\nAGREEMENT, in full")
    with pytest.raises(ValueError, match="does not read like"):
        build_family(folder, "ada", license="llama2", llm_license="llama2", license_files=[wrong])
    release = build_family(folder, "ada", license="llama2", llm_license="llama2", license_files=[right])[0]
    assert release.files["LICENSE"] == right.read_bytes()
    notice = release.files["NOTICE"].decode()
    assert notice.startswith(
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    )
    card = release.files["README.md"].decode()
    assert "license: llama2" in card
    assert "base_model_relation: adapter" in card
    assert str(tmp_path) not in release.files["facts.json"].decode()


def test_the_text_of_clip_s_license_travels_with_its_weights(tmp_path, model, processor):
    folder = save_variant(tmp_path / "v", model, processor, 7)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vision_model_name_or_path": "openai/clip-vit-large-patch14-336", "vision_model_revision": COMMIT}
    (folder / "config.json").write_text(json.dumps(config))
    release = build_release(folder, "ada/x", stated=dataclasses.replace(STATED, vision_license="mit"))
    assert b"Copyright (c) 2021 OpenAI" in release.files["NOTICE"]
    card = release.files["README.md"].decode()
    assert "base_model:\n- openai/clip-vit-large-patch14-336\n" in card
    assert "base_model_relation: merge\n" in card
    assert "[NOTICE](NOTICE)" in card
    assert check_files(release.files) == []


def test_data_for_research_only_is_told(tiny_family):
    stated = dataclasses.replace(
        STATED, datasets=(Dataset("A", "cc-by-nc-4.0"), Dataset("B", "cc-by-4.0"), Dataset("nc"))
    )
    card = build_release(tiny_family / "tiny-m7", "ada/x", stated=stated).files["README.md"].decode()
    assert "non-commercial use only (A)" in card


def test_a_license_link_is_an_address(tiny_family):
    stated = StatedFacts(license="other", llm_license=None, license_name="mine", license_link="javascript:alert(1)")
    with pytest.raises(ValueError, match="license_link"):
        build_release(tiny_family / "tiny-m7", "ada/x", stated=stated)


def test_an_unpinned_or_local_language_model_is_refused(tmp_path, model, processor):
    folder = save_variant(tmp_path / "v", model, processor, 7, text="org/llm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_model_revision": "main"}))
    with pytest.raises(ValueError, match="without a commit"):
        build_release(folder, "ada/x", stated=STATED)
    (folder / "config.json").write_text(json.dumps(config | {"text_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="nobody else has"):
        build_release(folder, "ada/x", stated=STATED)

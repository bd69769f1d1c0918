"""Every shipped recipe against the code that reads it, and against the paper; every way to write a wrong one."""

import dataclasses
import itertools

import pytest
import yaml

from fusedvlm.tests.trainers import smoke
from fusedvlm.trainers.recipes import FOLDER, recipe_parsing as parsing
from fusedvlm.trainers.recipes.command_words import read_recipe
from fusedvlm.trainers.recipes.recipe_files import (
    Recipe,
    fields_of,
    load_recipe,
    merge,
    set_field,
    shipped_presets,
    shipped_recipes,
)
from fusedvlm.trainers.recipes.recipe_parsing import gradient_accumulation, plan_run
from fusedvlm.trainers.recipes.run_arguments import DataArguments, dataclasses_of
from fusedvlm.trainers.runs.run_recipe import ELASTIC_BEFORE, as_begun
from fusedvlm.trainers.runs.run_record import changes, write_record
from fusedvlm.trainers.runs.training_data import open_datasets
from fusedvlm.trainers.runs.variants import list_variants, plan_variant

RECIPES, PRESETS = sorted(shipped_recipes()), sorted(shipped_presets())
# "Scaling Capability in Token Space", appendix C.
PAPER_PAIRS = [(768, 8), (512, 8), (384, 8), (256, 8), (128, 8), (64, 8), (32, 8), (16, 8), (8, 8), (1, 1)]


def plan(name, preset=None, processes=1, **overrides):
    """A shipped recipe as typed arguments, on this machine (bf16 wants a GPU or use_cpu)."""
    recipe = load_recipe(name, preset)
    for field, value in {"training.use_cpu": True, **overrides}.items():
        set_field(recipe, field, value)
    return plan_run(recipe)


def test_what_is_shipped():
    assert RECIPES == ["contrastive", "elastic", "generation", "variants"]
    assert PRESETS == ["8xa100", "cpu_smoke", "single_gpu"]


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("processes", [1, 8])
def test_every_recipe_is_understood_by_the_code_that_reads_it(name, preset, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    too_many = {"cpu_smoke": "4 is no multiple of 2 samples x 8", "single_gpu": "128 is no multiple of 128 samples x 8"}
    if processes == 8 and (preset == "cpu_smoke" or (preset == "single_gpu" and name == "contrastive")):
        with pytest.raises(ValueError, match=f"global_batch_size={too_many[preset]} processes"):
            plan(name, preset)
        return
    monkeypatch.setattr(parsing.RecipeParser, "parse_args_into_dataclasses", _alone(parsing.RecipeParser))
    result = plan(name, preset)
    training = result.training
    at_once = training.per_device_train_batch_size * processes
    assert at_once * training.gradient_accumulation_steps == result.run.global_batch_size
    assert result.recipe.stage == (name if name != "elastic" else "generation")


def _alone(parser):
    """TrainingArguments would open a process group when told of several processes."""
    original = parser.parse_args_into_dataclasses

    def wrapper(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("WORLD_SIZE")
            return original(self, *args, **kwargs)

    return wrapper


def test_stage_1_is_the_papers(monkeypatch):
    result = plan("contrastive", "8xa100")
    training = result.training
    assert (training.max_steps, training.learning_rate, training.warmup_steps) == (1000, 2e-5, 0.1)
    assert training.lr_scheduler_type == "cosine"
    assert (training.per_device_train_batch_size, result.run.global_batch_size) == (32, 32 * 8)
    assert result.model.answer_positions == 512
    assert training.identity_loss_weight == 1.0
    assert (result.model.num_visual_tokens, result.model.max_local_views) == (256, 9)


def test_stage_2_is_the_papers():
    result = plan("generation")
    training = result.training
    assert (training.num_train_epochs, training.learning_rate, training.warmup_steps) == (2, 2e-5, 0.03)
    assert (training.lr_scheduler_type, training.max_steps) == ("cosine", -1)
    assert result.run.global_batch_size == 2560
    assert (result.model.num_visual_tokens, result.model.num_followup_visual_tokens) == (256, 8)
    assert result.model.fuser_config == {"num_hidden_layers": 20}
    assert training.elastic_num_visual_tokens is None


def test_stage_3_is_the_papers_and_otherwise_stage_2():
    result, stage2 = plan("variants"), plan("generation")
    variants = list_variants(result)
    assert [(v.num_visual_tokens, v.num_followup_visual_tokens) for v in variants] == PAPER_PAIRS * 2
    assert [v.fuse_question for v in variants] == [True] * 10 + [False] * 10
    assert len({v.name for v in variants}) == 20
    assert result.data.fraction == 0.1
    different = {
        name
        for name, value in vars(result.training).items()
        if value != getattr(stage2.training, name) and not name.startswith("_") and "dir" not in name
    }
    assert different <= {"run_name", "deepspeed_plugin", "distributed_state", "accelerator_config"}
    one = plan_variant(result, variants[-1])
    assert (one.model.num_visual_tokens, one.model.num_followup_visual_tokens, one.model.fuse_question) == (1, 1, False)
    assert one.model.trained_num_visual_tokens == [1]
    assert one.recipe.sections["model"]["num_visual_tokens"] == 1


def test_the_elastic_run_covers_every_m_of_the_paper():
    result = plan("elastic")
    assert result.training.elastic_range == [1, 768]
    assert result.training.elastic_num_visual_tokens is None
    assert result.training.elastic_counts() == list(range(1, 769))
    assert sorted(result.model.trained_num_visual_tokens) == sorted(m for m, _ in PAPER_PAIRS)


def test_counts_that_are_listed_over_the_elastic_recipe_take_the_place_of_its_range(tmp_path):
    """What settings written before the range said, they say still."""
    own = tmp_path / "own.yaml"
    own.write_text("base: elastic\ntraining: {elastic_num_visual_tokens: [1, 8]}\n", encoding="utf-8")
    listed = load_recipe("elastic")
    listed.sections = merge(listed.sections, {"training": {"elastic_num_visual_tokens": [1, 8]}})
    typed = load_recipe("elastic")
    set_field(typed, "elastic_num_visual_tokens", [1, 8])
    for recipe in (load_recipe(own), listed, typed):
        training = recipe.sections["training"]
        assert training["elastic_num_visual_tokens"] == [1, 8]
        assert training["elastic_range"] is None
    back = merge(listed.sections, {"training": {"elastic_range": [1, 4]}})
    assert back["training"]["elastic_num_visual_tokens"] is None


def test_a_run_of_the_elastic_recipe_begun_before_it_drew_every_m_goes_on_with_its_counts(tmp_path):
    recipe = load_recipe("elastic")
    set_field(recipe, "output_dir", str(tmp_path))
    assert as_begun(recipe) is recipe
    begun = merge(recipe.sections, {"training": {"elastic_num_visual_tokens": ELASTIC_BEFORE}})
    write_record(tmp_path, {"format": 1, "recipe": begun})
    again = as_begun(recipe).sections["training"]
    assert again["elastic_num_visual_tokens"] == ELASTIC_BEFORE
    assert changes(begun, as_begun(recipe).sections) == []
    write_record(tmp_path, {"format": 1, "recipe": recipe.sections})
    assert as_begun(recipe) is recipe


@pytest.mark.parametrize(
    ("batch", "per_device", "processes", "steps"), [(2560, 8, 8, 40), (256, 32, 8, 1), (4, 2, 2, 1)]
)
def test_accumulation(batch, per_device, processes, steps):
    assert gradient_accumulation(batch, per_device, processes) == steps


def test_impossible_batches_are_refused_with_the_numbers_and_the_fix():
    with pytest.raises(ValueError) as error:
        gradient_accumulation(2560, 12, 8)
    assert str(error.value) == (
        "global_batch_size=2560 is no multiple of 12 samples x 8 processes = 96; use per_device_train_batch_size=10, "
        "or global_batch_size=2592."
    )
    with pytest.raises(ValueError, match="another number of processes"):
        gradient_accumulation(3, 1, 2)


def test_accumulation_is_stated_once():
    with pytest.raises(ValueError, match="gradient_accumulation_steps=7 contradicts global_batch_size=2560"):
        plan("generation", **{"training.gradient_accumulation_steps": 7})


def test_recipes_say_only_what_differs_from_their_base():
    for name, path in shipped_recipes().items():
        document = yaml.safe_load(path.read_text())
        base = load_recipe(FOLDER / document["base"]) if document["base"] != "base.yaml" else None
        sections = base.sections if base else yaml.safe_load((FOLDER / "base.yaml").read_text())
        for section in ("model", "data", "training", "run"):
            for field, value in document.get(section, {}).items():
                assert sections.get(section, {}).get(field) != value, f"{name}: {section}.{field} repeats its base"


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_recipe_reads_back_as_itself(name, preset, tmp_path):
    recipe = load_recipe(name, preset)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "resolved.yaml")
    assert (again.stage, again.sections) == (recipe.stage, {k: v for k, v in recipe.sections.items() if v})


# -- writing recipes ---------------------------------------------------------------------------------------------------


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_a_file_on_a_shipped_base_with_a_preset_and_flat_fields(tmp_path):
    path = write(
        tmp_path,
        "mine.yaml",
        "base: generation\npreset: single_gpu\nlearning_rate: 1e-5\nmodel: {fuser_config: {num_attention_heads: 8}}\n",
    )
    recipe = load_recipe(path)
    assert recipe.stage == "generation"
    assert recipe.sections["training"]["per_device_train_batch_size"] == 4
    assert recipe.sections["model"]["fuser_config"] == {"num_hidden_layers": 20, "num_attention_heads": 8}
    set_field(recipe, "use_cpu", True)
    assert plan_run(recipe).training.learning_rate == 1e-5  # YAML reads 1e-5 as text; the parser knows better


def test_what_a_file_says_wins_over_its_preset_and_a_given_preset_over_the_file(tmp_path):
    path = write(tmp_path, "mine.yaml", "base: generation\npreset: single_gpu\nper_device_train_batch_size: 16\n")
    assert load_recipe(path).sections["training"]["per_device_train_batch_size"] == 16
    assert load_recipe(path, "8xa100").sections["training"]["per_device_train_batch_size"] == 8


def test_a_tower_given_as_sizes_replaces_the_one_below_whole(tmp_path):
    path = write(
        tmp_path, "mine.yaml", "base: generation\npreset: cpu_smoke\nmodel: {text: {model_type: gpt2, n_embd: 8}}\n"
    )
    assert load_recipe(path).sections["model"]["text"] == {"model_type": "gpt2", "n_embd": 8}


def test_a_recipe_reads_the_environment_and_other_fields(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTH_OF_M", "4")
    path = write(
        tmp_path,
        "mine.yaml",
        "base: generation\npreset: cpu_smoke\nnum_visual_tokens: ${oc.env:WIDTH_OF_M}\n"
        "num_followup_visual_tokens: ${model.num_visual_tokens}\nlearning_rate: 1e-5\n",
    )
    plan = plan_run(load_recipe(path))
    assert (plan.model.num_visual_tokens, plan.model.num_followup_visual_tokens) == (4, 4)
    assert plan.training.learning_rate == 1e-5
    monkeypatch.delenv("WIDTH_OF_M")
    with pytest.raises(ValueError, match="WIDTH_OF_M"):
        plan_run(load_recipe(path))


def test_merging_leaves_its_arguments_alone():
    base, changes = {"a": {"b": 1, "c": [1]}}, {"a": {"c": [2], "d": None}}
    assert merge(base, changes) == {"a": {"b": 1, "c": [2], "d": None}}
    assert base == {"a": {"b": 1, "c": [1]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: generation\nbase: nothing\n", "There is no recipe 'nothing'"),
        ("stage: generaton\n", "unknown name 'generaton'; did you mean 'generation'"),
        ("base: base\n", "stage must be one of contrastive, generation, variants, got None"),
        ("base: generation\ntraining: {learning_rte: 1}\n", "'training.learning_rte'; did you mean 'training.learning_rate'"),
        ("base: generation\nlerning_rate: 1\n", "'lerning_rate'; did you mean 'learning_rate'"),
        ("base: generation\nmodle: {}\n", "'modle'; did you mean 'model'"),
        ("base: contrastive\nstage: generation\n", "unknown name 'training.identity_loss_weight'"),
        ("base: generation\nmodel: 3\n", "section 'model' must hold fields, got 3"),
        ("base: generation\nseed: 1\nseed: 2\n", "'seed' is stated twice"),
        ("- a\n", "must hold keys and values .a YAML mapping., found list"),
        ("a: [\n", "not YAML"),
        ("base: generation\npreset: big\n", "There is no recipe 'big'"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused_with_the_name_meant(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, "mine.yaml", text))


def test_circles_are_refused(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ValueError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("training.learning_rate", "fast", "training: argument --learning_rate/--learning-rate: invalid float"),
        ("training.max_steps", "1.5", "training: argument --max_steps/--max-steps: invalid int"),
        ("model.dtype", "float8", "model: argument --dtype: invalid"),
        ("model.fuser_config.num_layers", 3, "unknown name 'num_layers'; did you mean 'num_hidden_layers'"),
        ("data.fraction", 0, "data.fraction=0.0 must be above 0"),
        ("data.sources", [], "data.sources is empty"),
        ("data.sources", "file.json", "must be a YAML file or a list of mappings"),
        ("model.model_name_or_path", None, None),
        ("model.num_followup_visual_tokens", 300, "num_followup_visual_tokens=300 must not exceed num_visual_tokens=256"),
        ("training.per_device_train_batch_size", "many", "is not a number of samples"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(field, value, message):
    if message is None:
        assert plan("generation", **{field: value}).model.model_name_or_path is None
        return
    with pytest.raises(ValueError, match=message):
        plan("generation", **{field: value})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[8, 9]], r"\[8, 9\] must be \[m, m'\] with 1 <= m' <= m"),
        ([[8]], "must be"),
        ([[8, 1], [8, 2]], "names an m twice"),
        ([], "variants.pairs is empty"),
    ],
)
def test_wrong_ladders_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        plan("variants", **{"variants.pairs": pairs})


# -- command line ------------------------------------------------------------------------------------------------------


def test_words_override_fields_wherever_they_are():
    words = [
        "--config",
        "generation",
        "--learning-rate",
        "1e-4",
        "--model.fuser_config.num_hidden_layers",
        "4",
        "--use_cpu",
    ]
    words += ["--data.sources.1.path=other.json", "--elastic_num_visual_tokens", "1", "8", "--freeze", "model.merger."]
    recipe, only_print = read_recipe("generation", words)
    assert not only_print
    assert recipe.sections["data"]["sources"][1]["path"] == "other.json"
    assert recipe.sections["data"]["sources"][0]["type"] == "llava"
    result = plan_run(recipe)
    assert result.training.learning_rate == 1e-4
    assert result.training.elastic_num_visual_tokens == [1, 8]
    assert result.training.freeze == ["model.merger."]
    assert result.model.fuser_config == {"num_hidden_layers": 4}


def test_null_on_the_command_line_is_the_default():
    recipe, _ = read_recipe("generation", ["--model.model_name_or_path", "null", "--use_cpu"])
    assert plan_run(recipe).model.model_name_or_path is None


def test_one_word_lists_and_json_words():
    recipe, _ = read_recipe(
        "generation", ["--freeze", "model.merger.", "--use_cpu", "--sources", '[{"type":"chat","path":"a"}]']
    )
    result = plan_run(recipe)
    assert result.training.freeze == ["model.merger."]
    assert result.data.sources == [{"type": "chat", "path": "a"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine.yaml"], "belongs to no option; write --config mine.yaml"),
        (["--config"], "--config takes one value"),
        (["--config", "variants"], "is a recipe of stage 'variants'; run `fusedvlm train variants`"),
        (["--learning_rte", "1"], "did you mean 'learning_rate'"),
        (["--model.fuser_confg.x", "1"], "did you mean 'model.fuser_config'"),
        (["--data.sources.7.path", "x"], "the list has 4 entries, so '7' must be 0 to 3"),
        (["--seed.x", "1"], "training.seed is 0, which has no fields"),
        (["--print-config", "x"], "--print-config takes no value"),
    ],
)
def test_wrong_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("generation", words)


def test_python_recipes():
    recipe = Recipe("generation", {"model": {"vision": "a", "text": "b"}, "data": {"sources": [{"type": "chat"}]}})
    set_field(recipe, "training.use_cpu", True)
    result = plan_run(recipe)
    assert (result.model.vision, result.training.learning_rate, result.run.resume) == ("a", 2e-5, "auto")
    assert result.training.gradient_accumulation_steps == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_ends_for_streams_too(tmp_path, streaming):
    source = {"type": "chat", "path": str(smoke.write_data(tmp_path, count=5))}
    arguments = DataArguments(sources=[source], eval_sources=[{**source, "streaming": streaming}])
    _, evaluation = open_datasets(arguments)
    assert len(list(itertools.islice(iter(evaluation), 50))) == 5


@pytest.mark.parametrize("stage", ["contrastive", "generation", "variants"])
def test_names_read_from_source_are_the_dataclasses_own(stage):
    """`fusedvlm train` checks names before it imports what has them."""
    for section, kind in dataclasses_of(stage).items():
        assert set(fields_of(stage)[section]) == {entry.name for entry in dataclasses.fields(kind) if entry.init}

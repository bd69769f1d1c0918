"""A folder whose weights and configuration do not belong together is refused in one line, never answered from."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusedvlm.modeling_fusedvlm import (
    FusedVLMConfig,
    FusedVLMForConditionalGeneration,
    FusedVLMForContrastiveLearning,
    FusedVLMFusionModel,
    FusedVLMModel,
)
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_integrity import RECORD_KEY, trained_fields
from fusedvlm.tests import tiny

PARTS = ("projector.weight", "merger.conv.weight", "merger.newline", "fuser.layers.1.mlp.up_proj.weight",
         "fuser.embed_tokens.weight", "fuser.norm.weight", "vision_tower.post_layernorm.bias",
         "vision_tower.embeddings.patch_embedding.weight")  # fmt: skip


@pytest.fixture(scope="module")
def merged(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    model.save_pretrained(folder, merged=True)
    return folder


def damaged(source, target, config=None, tensors=None, record=True):
    """A copy with `config(dict)` and `tensors(dict)` applied, and with or without the record in the weights file."""
    target.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(source / name, target)
    if config is not None:
        data = json.loads((target / "config.json").read_text())
        config(data)
        (target / "config.json").write_text(json.dumps(data))
    weights = load_file(target / "model.safetensors")
    with safe_open(target / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    if tensors is not None:
        tensors(weights)
    save_file(weights, target / "model.safetensors", metadata=metadata if record else {"format": "pt"})
    return target


def refusal(folder, kind=FusedVLMForConditionalGeneration, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        kind.from_pretrained(folder, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 300
    return message


def every_trained_tensor(model):
    return [name for name in model.state_dict() if "language_model" not in name and "lm_head" not in name]


def test_every_trained_tensor_is_missed_by_name(model, variant, tmp_path):
    for number, name in enumerate(every_trained_tensor(model)):
        folder = damaged(variant, tmp_path / str(number), tensors=lambda weights, name=name: weights.pop(name))
        assert f"lack {name}" in refusal(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", ["shape", "nan", "infinity", "surplus"])
def test_damaged_tensors_are_named(part, what, variant, tmp_path):
    name = f"model.{part}"

    def damage(weights):
        tensor = weights[name].clone()
        if what == "surplus":
            weights[f"{name}_2"] = tensor
        elif what == "shape":
            weights[name] = torch.cat([tensor, tensor], dim=-1)
        else:
            tensor.view(-1)[-1] = float("nan") if what == "nan" else float("-inf")
            weights[name] = tensor

    message = refusal(damaged(variant, tmp_path / "x", tensors=damage))
    assert name in message
    assert {"shape": "shape", "surplus": "no part of the model"}.get(what, "NaN") in message


def test_values_are_checked_in_half_precision_too(variant, tmp_path):
    def damage(weights):
        weights["model.fuser.norm.weight"][3] = float("nan")

    folder = damaged(variant, tmp_path / "x", tensors=damage)
    for dtype in (torch.float16, torch.bfloat16):
        assert "model.fuser.norm.weight holds NaN" in refusal(folder, dtype=dtype)
    with pytest.raises(ValueError, match="NaN"):
        FusedVLMModel.from_pretrained(folder)


def test_large_finite_values_are_no_damage(variant, tmp_path):
    def enlarge(weights):
        weights["model.fuser.norm.weight"][:] = 3e38  # whose sum is infinite

    FusedVLMForConditionalGeneration.from_pretrained(damaged(variant, tmp_path / "x", tensors=enlarge))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("merge_views", False),
        ("newline_token", False),
        ("fuse_question", False),
        ("distinct_queries", False),
        ("first_query_token_id", 279),
        ("image_token_id", 4),
        ("vision_config.num_hidden_layers", 1),
        ("vision_config.num_attention_heads", 8),
        ("vision_config.hidden_act", "gelu"),
        ("vision_config.layer_norm_eps", 0.1),
        ("fuser_config.num_hidden_layers", 1),
        ("fuser_config.num_hidden_layers", 3),
        ("fuser_config.eos_token_id", 5),
        ("fuser_config.rms_norm_eps", 0.1),
        ("fuser_config.rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("text_config.num_hidden_layers", 1),
        ("text_config.rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("text_config.hidden_act", "gelu"),
    ],
)
def test_a_configuration_other_than_the_trained_one_is_refused(field, value, variant, tmp_path):
    def change(config):
        place, _, name = field.rpartition(".")
        (config[place] if place else config)[name] = value

    message = refusal(damaged(variant, tmp_path / "x", config=change))
    assert f"{field} is {value!r}"[:60] in message
    assert "trained with" in message
    assert "ignore_mismatched_sizes" in message
    FusedVLMForConditionalGeneration.from_pretrained(tmp_path / "x", ignore_mismatched_sizes=True)


def test_a_field_that_was_deleted_is_refused_when_its_default_differs(backbones, tmp_path):
    tiny.build_model(backbones, fuse_question=False).save_pretrained(tmp_path / "source")
    folder = damaged(tmp_path / "source", tmp_path / "x", config=lambda config: config.pop("fuse_question"))
    assert "fuse_question is True, trained with False" in refusal(folder)


def test_the_dial_and_names_may_change(variant, tmp_path):
    def change(config):
        config.update(num_visual_tokens=5, num_followup_visual_tokens=1, max_local_views=4, text_model_revision=None)
        config["text_config"]["pad_token_id"] = 2

    FusedVLMForConditionalGeneration.from_pretrained(damaged(variant, tmp_path / "x", config=change))


def test_weights_beside_the_configuration_of_another_variant_are_refused(backbones, variant, tmp_path):
    tiny.build_model(backbones, fuse_question=False).save_pretrained(tmp_path / "other")
    shutil.copy(variant / "config.json", tmp_path / "other")
    assert "fuse_question" in refusal(tmp_path / "other")


@pytest.mark.parametrize("tower", ["vision_config", "fuser_config", "text_config"])
@pytest.mark.parametrize("layers", [1, 3])
def test_layer_counts_are_compared_with_files_that_have_no_record(tower, layers, variant, merged, tmp_path):
    def change(config):
        config[tower]["num_hidden_layers"] = layers

    for source in (variant, merged):
        folder = damaged(source, tmp_path / source.name, config=change, record=False)
        assert f".{min(layers, 2)}." if layers > 2 else ".1." in refusal(folder)


def test_files_without_a_record_still_load(variant, tmp_path):
    FusedVLMForConditionalGeneration.from_pretrained(damaged(variant, tmp_path / "x", record=False))


def test_the_record_names_no_folder(variant):
    with safe_open(variant / "model.safetensors", "pt") as file:
        record = file.metadata()[RECORD_KEY]
    assert str(variant.parent) not in record
    assert json.loads(record) == json.loads(json.dumps(trained_fields(FusedVLMConfig.from_pretrained(variant))))


def test_every_shard_has_the_record(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert RECORD_KEY in file.metadata()


def test_a_self_contained_copy_lacks_nothing_of_its_llm(merged, tmp_path):
    for number, name in enumerate(["lm_head.weight", "model.language_model.norm.weight"]):
        folder = damaged(merged, tmp_path / str(number), tensors=lambda weights, name=name: weights.pop(name))
        assert name in refusal(folder)


def test_stage_2_starts_from_stage_1_and_no_other_way(model, tmp_path):
    first = tiny.build_contrastive_model(model)
    first.config.text_model_name_or_path = model.config.text_model_name_or_path
    first.save_pretrained(tmp_path / "stage1")
    second = FusedVLMForConditionalGeneration.from_pretrained(tmp_path / "stage1")
    assert torch.equal(second.model.fuser.norm.weight, first.model.fuser.norm.weight)
    second.save_pretrained(tmp_path / "stage2")
    assert "answer_projection" in refusal(tmp_path / "stage2", FusedVLMForContrastiveLearning)
    folder = damaged_stage_1(tmp_path)
    assert "lack model.fuser.norm.weight" in refusal(folder)
    assert "lack model.fuser.norm.weight" in refusal(folder, FusedVLMForContrastiveLearning)


def damaged_stage_1(tmp_path):
    shutil.copy(tmp_path / "stage2" / "generation_config.json", tmp_path / "stage1")
    return damaged(tmp_path / "stage1", tmp_path / "x", tensors=lambda weights: weights.pop("model.fuser.norm.weight"))


def test_parts_of_a_whole_variant_load(variant, merged):
    for folder in (variant, merged):
        FusedVLMModel.from_pretrained(folder)
        FusedVLMFusionModel.from_pretrained(folder)


@pytest.mark.parametrize("tower", ["vision_config", "fuser_config", "text_config"])
@pytest.mark.parametrize("value", ["missing", None, {}, "llama", {"hidden_size": 48}])
def test_a_configuration_states_every_tower(tower, value, variant, tmp_path):
    def change(config):
        config.pop(tower) if value == "missing" else config.update({tower: value})

    folder = damaged(variant, tmp_path / "x", config=change)
    assert tower in refusal(folder)
    with pytest.raises(ValueError, match=tower):
        FusedVLMConfig.from_pretrained(folder)


def test_a_default_configuration_is_written_whole(tmp_path):
    FusedVLMConfig().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    for tower in ("vision_config", "fuser_config", "text_config"):
        assert data[tower]["hidden_size"] > 0
    assert (
        FusedVLMConfig.from_pretrained(tmp_path).to_dict()["text_config"] == FusedVLMConfig().to_dict()["text_config"]
    )


@pytest.mark.parametrize("left", [0, 60], ids=["nothing", "a part"])
def test_a_shard_that_was_cut_off_is_named(left, model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    path = sorted(tmp_path.glob("model-*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{path.name}: damaged weights") as caught:
        FusedVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(dtype, variant, tmp_path):
    """Rounded to nothing, they would answer all the same."""
    folder = shutil.copytree(variant, tmp_path / "copy")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.projector.weight"] = tensors["model.projector.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=r"model\.projector\.weight holds whole numbers"):
        FusedVLMForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("wrong", [280, 281, 10**6, -1])
def test_questions_of_another_tokenizer_are_refused(wrong, model, processor):
    """Ids behind the vocabulary would be read as queries, without a word, or fall out of the table."""
    inputs = processor(images=[tiny.picture(0)], text=["<image> one?"], return_tensors="pt")
    model.generate(**inputs, max_new_tokens=1)
    inputs["question_input_ids"][-1] = wrong
    with pytest.raises(ValueError, match=r"must be 0 to 279.*saved with this model"):
        model.generate(**inputs, max_new_tokens=1)

"""Bad values are refused with their numbers; a config survives JSON; sub configs load alone."""

import pytest

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMFuserConfig


def test_defaults_are_the_papers_size():
    config = FusedVLMConfig()
    assert config.tokens_per_view == 145
    assert config.vision_config.image_size == 336
    assert config.fuser_config.num_hidden_layers == 20
    assert config.text_config.num_hidden_layers == 32
    assert (config.num_visual_tokens, config.num_followup_visual_tokens) == (256, 8)


@pytest.mark.parametrize(
    ("kwargs", "numbers"),
    [
        ({"fuser_config": {"hidden_size": 512, "num_attention_heads": 8}}, ["512", "1024"]),
        ({"fuser_config": {"hidden_size": 2048, "num_attention_heads": 8}}, ["2048", "1024"]),
        ({"num_visual_tokens": 400}, ["399", "49807"]),
        ({"num_visual_tokens": 0}, ["0"]),
        ({"num_visual_tokens": 300, "trained_num_visual_tokens": [1, 256]}, ["300", "1 to 256"]),
        ({"num_visual_tokens": 4, "num_followup_visual_tokens": 9, "trained_num_visual_tokens": [16]}, ["9", "4"]),
        ({"trained_num_visual_tokens": [0, 256]}, ["0, 256"]),
    ],
)
def test_wrong_sizes_are_refused_with_the_numbers(kwargs, numbers):
    with pytest.raises(ValueError) as error:
        FusedVLMConfig(**kwargs)
    assert all(number in str(error.value) for number in numbers)


def test_unsupported_llm_head_is_refused():
    with pytest.raises(ValueError, match="lm_head_multiplier"):
        FusedVLMConfig(text_config={"model_type": "falcon_h1", "lm_head_multiplier": 0.5})


def test_small_m_lowers_the_default_followup_count():
    assert FusedVLMConfig(num_visual_tokens=1).num_followup_visual_tokens == 1


def test_round_trip_and_sub_configs(tmp_path):
    config = FusedVLMConfig(num_visual_tokens=64, trained_num_visual_tokens=[1, 64, 256], fuse_question=False)
    config.save_pretrained(tmp_path)
    again = FusedVLMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    fuser = FusedVLMFuserConfig.from_pretrained(tmp_path)
    assert (fuser.model_type, fuser.hidden_size, fuser.num_hidden_layers) == ("fusedvlm_fuser", 1024, 20)


def test_siglip_tower_keeps_its_type_and_loses_its_unused_head():
    config = FusedVLMConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1024,
            "image_size": 384,
            "patch_size": 14,
            "num_attention_heads": 16,
        }
    )
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.vision_config.vision_use_head is False
    assert config.view_grid_size == 14  # odd 27 x 27 grid

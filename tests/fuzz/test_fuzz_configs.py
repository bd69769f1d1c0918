"""config.json from strangers: a configuration whose numbers fit together and come back, or one line that names the file."""

import json
import math
from pathlib import Path

import pytest

from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.tests.fuzz.harness import ODD, Target, explore, json_cases, judge


def read_config(case: bytes, folder: Path) -> None:
    """What a configuration promises, and that it survives being saved."""
    path = folder / "config.json"
    path.write_bytes(case)
    config = FusedVLMConfig.from_pretrained(folder)
    m, largest = config.num_visual_tokens, config.max_num_visual_tokens
    for value in (m, largest, config.num_followup_visual_tokens, config.tokens_per_view, config.view_grid_size):
        assert type(value) is int, value
    assert 1 <= config.num_followup_visual_tokens <= m <= largest
    assert config.tokens_per_view == config.view_grid_size**2 + config.newline_token
    assert config.vision_config.hidden_size == config.fuser_config.hidden_size
    assert config.view_grid_size >= 1
    if config.distinct_queries:
        assert config.first_query_token_id + largest - 1 <= config.fuser_config.vocab_size
    config.check_num_visual_tokens(1)
    again = FusedVLMConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()


FINITE = [value for value in ODD if not (isinstance(value, float) and not math.isfinite(value))]
TARGET = Target("configs", read_config, ("config.json",), json_cases(broken=True, odd=FINITE))


@pytest.mark.parametrize("path", TARGET.corpus(), ids=lambda path: path.name)
def test_the_corpus(path, tmp_path):
    kind = judge(TARGET, path.read_bytes(), tmp_path)
    assert kind == "clean" or not path.name.startswith("seed-")


@pytest.mark.parametrize("name", ["initializer_range", "projector_initializer_range", "logit_scale_init_value"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_are_finite(name, value):
    with pytest.raises(ValueError, match=name):
        FusedVLMConfig(**{name: value})


@pytest.mark.timeout(0)
def test_damaged_configurations(tmp_path):
    seen = explore(TARGET, tmp_path)
    assert seen["clean"]
    assert seen["refused"]

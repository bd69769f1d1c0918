"""`fusedvlm info` from plain JSON says what it says of the model itself, or leaves it to it."""

import json
import random
import subprocess
import sys

import pytest

from fusedvlm import wording
from fusedvlm.costs import variant_info
from fusedvlm.costs.meta_model import count_parameters, read_variant_config
from fusedvlm.costs.plain_config import read_plainly
from fusedvlm.modeling_fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connector import name_counts

TEXTS = [
    {},
    {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    {"model_type": "mistral", "num_key_value_heads": 2},
    {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
]


def config_of(text, **fields):
    sizes = {"hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 330}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 30, "patch_size": 4}  # fmt: skip
    fuser = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 300, "eos_token_id": 1}  # fmt: skip
    given = {"num_visual_tokens": 7, "trained_num_visual_tokens": [1, 7, 12], "first_query_token_id": 280, **fields}
    return FusedVLMConfig(
        vision_config=vision, fuser_config=fuser, text_config={"model_type": "llama", **sizes, **text}, **given
    )


@pytest.mark.parametrize("fields", [{}, {"merge_views": False}, {"newline_token": False, "fuse_question": False}])
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_the_formula_counts_what_the_model_has(text, fields, tmp_path):
    config = config_of(text, **fields)
    config.save_pretrained(tmp_path)
    plain = read_plainly(str(tmp_path))
    assert plain.plain_parameters == count_parameters(config)
    assert variant_info.describe_config(plain) == variant_info.describe_config(config)


def test_the_formula_counts_the_papers_size(tmp_path):
    config = FusedVLMConfig(num_visual_tokens=256, fusion_row_per_turn=False)
    config.save_pretrained(tmp_path)
    assert read_plainly(str(tmp_path)).plain_parameters == count_parameters(config)


@pytest.mark.parametrize("fields", [{"connector": "pool", "num_visual_tokens": 9, "trained_num_visual_tokens": [9]}])
def test_other_connectors_are_left_to_the_model(fields, tmp_path):
    FusedVLMConfig(**fields).save_pretrained(tmp_path)
    assert read_plainly(str(tmp_path)) is None


def test_a_damaged_file_is_never_described_otherwise_than_the_model_is(tmp_path):
    config_of({}).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    places = [(whole, name) for name in whole] + [
        (whole[part], name) for part in ("vision_config", "text_config", "fuser_config") for name in whole[part]
    ]
    generator = random.Random(0)
    answered = 0
    for number in range(250):
        part, name = generator.choice(places)
        before = part[name]
        part[name] = generator.choice([None, 0, -1, 3, 13, 1.5, True, "x", [], [5], {}, 10**9])
        (tmp_path / "config.json").write_text(json.dumps(whole))
        plain = read_plainly(str(tmp_path))
        if plain is not None:
            answered += 1
            try:
                expected = variant_info.describe_config(read_variant_config(str(tmp_path)))
            except Exception:  # noqa: BLE001 refused for what no line of the description shows
                assert name not in {"hidden_size", "num_hidden_layers", "num_visual_tokens"}, (number, name)
            else:
                assert variant_info.describe_config(plain) == expected, (number, name)
        part[name] = before
    assert answered > 20


def test_info_imports_neither_torch_nor_transformers(variant):
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fusedvlm.cli import app\n"
        f"done = CliRunner().invoke(app, ['info', {str(variant)!r}])\n"
        "assert done.exit_code == 0, done.output\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], 'Parameters' in done.output)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_counts_are_named_as_the_models_name_them():
    for counts in ([1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16], [5, 3, 4, 9, 10, 11], range(1, 33), []):
        assert wording.name_counts(counts) == name_counts(counts)

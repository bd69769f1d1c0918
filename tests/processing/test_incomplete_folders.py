"""A folder that lacks a file of its processor says which, instead of reading text with other tokens."""

import shutil

import pytest
from transformers import AutoProcessor

from fusedvlm.processing import FusedVLMProcessor
from fusedvlm.tests import tiny

MESSAGES = [tiny.user(tiny.picture(0), text="what is it?")]


def encode(processor):
    return processor.apply_chat_template(MESSAGES, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize("loader", [FusedVLMProcessor, AutoProcessor])
@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "query_tokenizer/tokenizer_config.json", "tokenizer.json",
     "query_tokenizer/tokenizer.json", "processor_config.json", "chat_template.jinja"],
)  # fmt: skip
def test_every_missing_file_is_refused(name, loader, variant, tmp_path):
    folder = tmp_path / "variant"
    shutil.copytree(variant, folder)
    encode(FusedVLMProcessor.from_pretrained(folder))
    (folder / name).unlink()
    with pytest.raises((OSError, ValueError, TypeError)) as error:
        encode(loader.from_pretrained(folder, **({"trust_remote_code": True} if loader is AutoProcessor else {})))
    if name.endswith("tokenizer_config.json"):
        assert f"no {name}" in str(error.value)
        assert len(str(error.value)) <= 300

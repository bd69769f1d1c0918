"""The published tiny models as published folders, and loaded into this package through the converter."""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from fusedvlm.conversion.convert import ConversionOptions, load_published
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning

FOLDER = Path(__file__).parents[1] / "oracle"
IMAGE_TOKEN_ID = 0  # <unk>: the published code reuses the eos id, which is ambiguous


def arrays(name: str) -> dict[str, np.ndarray]:
    """Arrays of one case file."""
    return dict(np.load(FOLDER / f"{name}.npz"))


def publish(folder: Path) -> Path:
    """Lay out the full model as published: LLM tokenizer beside the weights, query tokenizer in `clip/`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FOLDER / "vlm_state.safetensors", folder / "model.safetensors")
    shutil.copyfile(FOLDER / "vlm_saved_config.json", folder / "config.json")
    shutil.copytree(FOLDER / "llm_tokenizer", folder, dirs_exist_ok=True)
    shutil.copytree(FOLDER / "clip_tokenizer", folder / "clip")
    return folder


def publish_stage_one(folder: Path) -> Path:
    """Lay out the stage-1 model, which has no tokenizers."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FOLDER / "contrastive_state.safetensors", folder / "model.safetensors")
    shutil.copyfile(FOLDER / "contrastive_config.json", folder / "config.json")
    return folder


def model() -> FusedVLMForConditionalGeneration:
    """The published weights in fp32."""
    with tempfile.TemporaryDirectory() as scratch:
        return load_published(publish(Path(scratch)), ConversionOptions(dtype="float32"))[0]


def stage_one_model(**options) -> FusedVLMForContrastiveLearning:
    """The published stage-1 weights in fp32."""
    with tempfile.TemporaryDirectory() as scratch:
        return load_published(publish_stage_one(Path(scratch)), ConversionOptions(dtype="float32", **options))[0]

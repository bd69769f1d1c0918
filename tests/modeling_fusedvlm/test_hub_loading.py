"""A saved folder works under trust_remote_code where this package cannot be imported."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedvlm.tests import fork_server, tiny

ROOT = Path(__file__).parents[2]
HUB_FILES = sorted(
    [
        *(ROOT / "modeling_fusedvlm").glob("modeling_fusedvlm*.py"),
        *(ROOT / "modeling_fusedvlm").glob("configuration_fusedvlm.py"),
        *(ROOT / "processing").glob("processing_fusedvlm*.py"),
        *(ROOT / "processing").glob("image_processing_*fusedvlm*.py"),
    ]
)
ALLOWED = {
    "torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors", "torchvision", "base64", "binascii", "concurrent",
    "contextlib", "copy", "difflib", "inspect", "collections", "dataclasses", "io", "json", "math", "os", "pathlib", "re", "struct", "threading", "typing",
    "urllib", "warnings", "weakref", "zlib",
}  # fmt: skip

PROBE = """
import json, sys
sys.modules["fusedvlm"] = None  # importing the package fails
sys.modules["open_clip"] = None
import torch
torch.set_num_threads(1)
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline)
folder, picture, dtype = sys.argv[1:4]
kwargs = json.loads(sys.argv[4])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **kwargs).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image_processors = [AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend=b) for b in ("torchvision", "pil")]
messages = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "what is it?"}]}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=dtype)
piped = pipe(text=messages, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})[0]["generated_text"]
two = [messages, [{"role": "user", "content": [*messages[0]["content"][:1] * 2, {"type": "text", "text": "the same or not?"}]}]]
singles = [pipe(text=m, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})[0]["generated_text"] for m in two]
batched = [r[0]["generated_text"] for r in pipe(text=two, max_new_tokens=6, batch_size=2, return_full_text=False, generate_kwargs={"do_sample": False})]
pixels = [p(Image.open(picture), return_tensors="pt")["pixel_values"] for p in image_processors]
print(json.dumps({
    "tokens": tokens, "piped": piped, "decoded": processor.decode(tokens, skip_special_tokens=True),
    "singles": singles, "batched": batched,
    "same_pixels": bool((pixels[0] - pixels[1]).abs().max() < 1e-5),
    "backends": [type(p).__name__ for p in image_processors],
    "modules": sorted({type(x).__module__.split(".")[0] for x in (config, model, base, processor, *image_processors)}),
    "dtype": str(model.lm_head.weight.dtype), "class": type(model).__name__,
    "placed": sorted(set(map(str, getattr(model, "hf_device_map", {}).values()))),
}))
"""


def probe(folder, picture, tmp_path, dtype="float32", **kwargs) -> dict:
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    run = subprocess.run(
        [fork_server.executable(), "-c", PROBE, str(folder), str(picture), dtype, json.dumps(kwargs)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    tiny.picture(8).save(path)
    return path


@pytest.fixture(scope="module")
def expected(model, processor, picture):
    messages = [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what is it?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()


def test_every_auto_class_and_the_pipeline_without_the_package(variant, picture, expected, tmp_path):
    result = probe(variant, picture, tmp_path)
    assert result["tokens"] == expected
    assert result["piped"].strip() == result["decoded"].strip()
    assert result["batched"] == result["singles"]
    assert result["same_pixels"]
    assert result["backends"] == ["FusedVLMImageProcessor", "FusedVLMImageProcessorPil"]
    assert result["modules"] == ["transformers_modules"]
    assert result["class"] == "FusedVLMForConditionalGeneration"


def test_bf16_and_a_device_map_without_the_package(variant, picture, tmp_path):
    result = probe(variant, picture, tmp_path, "bfloat16", device_map="auto")
    assert result["dtype"] == "torch.bfloat16"
    assert result["batched"] == result["singles"]


def test_modules_placed_on_disk_give_the_same_answer(variant, processor, picture, expected, tmp_path):
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration

    device_map = {f"model.{name}": "cpu" for name in ("vision_tower", "merger", "projector")}
    device_map |= {"model.fuser": "disk", "model.language_model": "disk", "lm_head": "cpu"}
    placed = FusedVLMForConditionalGeneration.from_pretrained(
        variant, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert placed.model.language_model.layers[0].mlp.up_proj.weight.device.type == "meta"
    messages = [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what is it?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    tokens = placed.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokens.tolist() == expected


def test_a_copy_saved_from_remote_code_loads_again(variant, picture, expected, tmp_path):
    script = (
        "import sys; sys.modules['fusedvlm'] = None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])\n"
        "AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "first"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [fork_server.executable(), "-c", script, str(variant), str(tmp_path / "copy")],
        check=True,
        env=environment,
        capture_output=True,
    )
    assert probe(tmp_path / "copy", picture, tmp_path)["tokens"] == expected


def test_memory_holds_the_llm_once(tmp_path):
    """Loading peaks at little more than the model itself, not at two copies of the LLM."""
    from transformers import LlamaConfig

    tiny.save_backbones(
        tmp_path,
        llm_config=LlamaConfig(
            vocab_size=len(tiny.text_tokenizer()),
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=12,
            num_attention_heads=8,
            max_position_embeddings=1024,
        ),
        llm_dtype=torch.bfloat16,
    )
    model = tiny.build_model(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "variant")
    llm_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    script = (
        "import resource, sys, torch\n"
        "from transformers import AutoModelForImageTextToText\n"
        "import transformers.models.llama.modeling_llama, transformers.models.clip.modeling_clip\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)\n"
        "total = sum(float(p.float().sum()) for p in model.parameters())\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "variant")],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    grown = int(run.stdout.strip().splitlines()[-1])
    assert llm_bytes > 300e6
    assert grown < 1.6 * llm_bytes


@pytest.mark.parametrize("path", HUB_FILES, ids=[path.name for path in HUB_FILES])
def test_shipped_files_keep_the_import_rules(path):
    """Only same-folder imports that the Hub's scanner follows, and only libraries every user has."""
    names = {file.stem for file in HUB_FILES if file.parent == path.parent}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in names, f"{path.name} imports .{node.module}, which is not shipped"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in ALLOWED
        elif isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in ALLOWED for alias in node.names)


def test_shipped_files_have_unique_names():
    names = [path.name for path in HUB_FILES]
    assert len(set(names)) == len(names)


def test_saved_folder_holds_every_shipped_file_and_no_pickle(variant):
    present = {path.name for path in variant.iterdir()}
    assert {path.name for path in HUB_FILES} <= present
    assert not [name for name in present if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    auto_map = json.loads((variant / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_damaged_folders_are_refused_in_one_line(variant, tmp_path, name, damage):
    import shutil

    from fusedvlm.serving import VisualChat

    broken = tmp_path / "broken"
    shutil.copytree(variant, broken)
    if damage == "missing":
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(b"" if damage == "empty" else b"\x00garbage")
    with pytest.raises(ValueError) as error:
        VisualChat(str(broken))
    assert "\n" not in str(error.value)
    assert str(broken) in str(error.value)


PIN = """
import sys, torch
from pathlib import Path
from fusedvlm.tests import tiny
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
folder, hub = Path(sys.argv[1]), Path(sys.argv[2])
model = FusedVLMForConditionalGeneration.from_backbones(
    str(folder / "vision"), "lab/llm", num_visual_tokens=4, query_vocab_size=tiny.query_tokenizer().vocab_size,
    query_eos_token_id=0, fuser_config={"num_hidden_layers": 1, "num_attention_heads": 2})
print(model.config.text_model_revision)
model.save_pretrained(folder / "variant")
(hub / "models--lab--llm/refs/main").write_text("b" * 40)
again = FusedVLMForConditionalGeneration.from_pretrained(folder / "variant")
print(torch.equal(again.lm_head.weight, model.lm_head.weight))
again.config.text_model_revision = "c" * 40
again.save_pretrained(folder / "variant")
try:
    FusedVLMForConditionalGeneration.from_pretrained(folder / "variant")
except OSError as error:
    print(str(error).splitlines()[0])
"""


def test_llm_is_pinned_to_its_commit(tmp_path):
    """The variant keeps reading the commit it was trained with after the LLM's repository has moved on."""
    import shutil

    tiny.save_backbones(tmp_path, seed=0)
    repository = tmp_path / "hub" / "models--lab--llm"
    shutil.copytree(tmp_path / "llm", repository / "snapshots" / ("a" * 40))
    tiny.save_backbones(tmp_path, seed=9)
    shutil.copytree(tmp_path / "llm", repository / "snapshots" / ("b" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    run = subprocess.run(
        [fork_server.executable(), "-c", PIN, str(tmp_path), str(tmp_path / "hub")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    commit, same, message = run.stdout.strip().splitlines()
    assert commit == "a" * 40
    assert same == "True"
    assert f"needs the language model lab/llm at commit {'c' * 40}" in message

"""From the served repository back to a model: in a process without this package, equal to the local one."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fusedvlm.hub_cards.facts import StatedFacts
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.push.push_repository import push
from fusedvlm.hub_cards.release.variant_release import build_release
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests import fork_server, tiny
from fusedvlm.tests.hub_cards.faulty_hub import FaultyHub
from fusedvlm.tests.hub_cards.synthetic import Synthetic

STATED = StatedFacts(license="apache-2.0", llm_license="apache-2.0")
QUESTION = "what is in the image?"

# argv: repository, revision, picture, output
ELSEWHERE = """
import sys
sys.modules["fusedvlm"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
repo, revision, picture, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "what is in the image?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
torch.save({"state": model.state_dict(), "logits": logits, "tokens": tokens, "inputs": dict(inputs)}, output)
"""


@pytest.fixture(scope="module", params=["xet", "lfs"])
def served(request, backbones, tmp_path_factory):
    """A Hub with a variant that refers to an LLM of the same Hub by commit, sent one way or the other.

    The server carries `mode`, `hub`, `model`, `processor` and `llm_commit`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    with FaultyHub(tmp_path_factory.mktemp("content")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
        server.mode = request.param
        server.hub = Hub(server.endpoint, server.add_user("ada"), RetryPolicy(attempts=2, first_wait=0.0))
        server.llm_commit = push_llm(server.hub, backbones, "ada/tiny-llm", public=True)
        server.model = tiny.build_model(backbones)
        server.processor = tiny.build_tiny_processor(server.model)
        push_variant(server, tmp_path_factory.mktemp("variant"), "tiny-m7", "ada/tiny-llm", server.llm_commit)
        yield server
    close_session()


def push_llm(hub: Hub, backbones: Path, repo_id: str, public: bool) -> str:
    """Push the tiny LLM; returns its commit."""
    files = {path.name: path for path in (backbones / "llm").iterdir() if path.is_file()}
    return push([Synthetic(repo_id, "v1.0", 0, files)], hub, public=public)[0].commit


def push_variant(server, folder: Path, name: str, llm: str, commit: str) -> str:
    """Push the tiny variant with a reference to an LLM; returns its repository."""
    server.model.save_pretrained(folder)
    server.processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(text_model_name_or_path=llm, text_model_revision=commit)
    (folder / "config.json").write_text(json.dumps(config))
    push([build_release(folder, f"ada/{name}", stated=STATED)], server.hub, public=True)
    return f"ada/{name}"


def run_elsewhere(server, home: Path, *arguments: str, script: str = ELSEWHERE, **variables: str):
    """A script in a process that knows nothing of this one."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {
        **inherited,
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1" if server.mode == "lfs" else "0",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        **variables,
    }
    return subprocess.run(
        [fork_server.executable(), "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home.parent,
        check=False,
    )


def ask_here(model, processor):
    """What ELSEWHERE asks, of the local model."""
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.picture(3), text=QUESTION)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False), inputs


@pytest.fixture
def picture(tmp_path):
    """A picture's file."""
    tiny.picture(3).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_served_variant_answers_as_the_local_one(served, picture, tmp_path):
    model, processor = served.model, served.processor
    run = run_elsewhere(served, tmp_path / "home", "ada/tiny-m7", "v1.0", picture, tmp_path / "out.pt")
    assert run.returncode == 0, run.stderr[-3000:]
    loaded = torch.load(tmp_path / "out.pt", weights_only=False)
    logits, tokens, inputs = ask_here(model, processor)
    assert loaded["inputs"].keys() == inputs.keys()
    for name, value in inputs.items():
        torch.testing.assert_close(loaded["inputs"][name], value, atol=0, rtol=0)
    own = model.state_dict()
    assert loaded["state"].keys() == own.keys()
    assert all(torch.equal(loaded["state"][name], tensor) for name, tensor in own.items())
    torch.testing.assert_close(loaded["logits"], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(loaded["tokens"], tokens)


# argv: output, then repository@revision ...
REFUSED = """
import json, sys
sys.modules["fusedvlm"] = None
from transformers import AutoModelForImageTextToText
errors = {}
for wanted in sys.argv[2:]:
    repo, _, revision = wanted.partition("@")
    try:
        AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True)
        errors[wanted] = None
    except Exception as error:
        errors[wanted] = [type(error).__name__, str(error)]
json.dump(errors, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("served", ["lfs"], indirect=True)  # how files travel makes no difference to what is missing
def test_what_is_missing_is_named(served, backbones, tmp_path):
    absent = "0123456789abcdef0123456789abcdef01234567"
    secret = push_llm(served.hub, backbones, "ada/secret-llm", public=False)
    references = {
        "wrong-commit": ("ada/tiny-llm", absent),
        "no-such-llm": ("ada/gone", absent),
        "private-llm": ("ada/secret-llm", secret),
    }
    for name, (llm, commit) in references.items():
        push_variant(served, tmp_path / name, name, llm, commit)
    wanted = [*(f"ada/{name}@v1.0" for name in references), "ada/tiny-m7@v9", "ada/nothing@v1.0"]
    run = run_elsewhere(served, tmp_path / "home", tmp_path / "errors.json", *wanted, script=REFUSED)
    assert run.returncode == 0, run.stderr[-2000:]
    errors = json.loads((tmp_path / "errors.json").read_text())
    for name, (llm, commit) in references.items():
        kind, text = errors[f"ada/{name}@v1.0"]
        assert kind == "OSError"
        assert f"needs the language model {llm} at commit {commit}, which cannot be loaded" in text
    assert "v9" in errors["ada/tiny-m7@v9"][1]
    assert "ada/nothing" in errors["ada/nothing@v1.0"][1]

"""A written Space runs as it is: launched in a process of its own and asked through Gradio's client."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import time

import pytest
import yaml
from huggingface_hub import SpaceCardData

from fusedvlm.hub_cards.card.card_links import link_problems
from fusedvlm.hub_cards.release.space import space_files
from fusedvlm.tests import fork_server, tiny
from fusedvlm.tests.hub_cards.tiny_family import save_variant

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed (pip install 'fusedvlm[space]')"
)


def test_a_space_is_complete_and_names_no_folder(tiny_family):
    files = space_files(str(tiny_family / "tiny-m7"))
    assert {
        "app.py",
        "README.md",
        "requirements.txt",
        "space.json",
        "model/config.json",
        "model/model.safetensors",
    } <= set(files)
    assert "model/modeling_fusedvlm.py" in files
    for name, content in files.items():
        if isinstance(content, bytes):
            assert str(tiny_family.parent).encode() not in content, name
    metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    data = SpaceCardData(**metadata)
    assert (data.sdk, data.app_file) == ("gradio", "app.py")
    assert "fusedvlm" not in files["requirements.txt"].decode()
    assert not re.search(r"^\s*(import|from) fusedvlm", files["app.py"].decode(), re.MULTILINE)


def links_of(files):
    """What is wrong with the links of every page of a Space."""
    sizes = dict.fromkeys(files, 1)
    yield from link_problems(read(files["README.md"]).split("---\n", 2)[2], sizes)
    if "model/README.md" in files:
        inside = {name.removeprefix("model/"): 1 for name in files if name.startswith("model/")}
        yield from link_problems(read(files["model/README.md"]).split("\n---\n", 1)[1], inside)


def read(content) -> str:
    return content.decode() if isinstance(content, bytes) else content.read_text()


def test_no_page_of_a_space_links_what_is_not_there(tiny_family, tiny_release, tmp_path):
    bare = space_files(str(tiny_family / "tiny-m7"))
    assert "model/README.md" not in bare
    assert "model/README.md" not in bare["README.md"].decode()
    tiny_release.write(tmp_path / "published")
    files = space_files(str(tmp_path / "published"))
    assert {"model/README.md", "model/plots/score_vs_m.png", "model/results.json"} <= set(files)
    assert "[ada/tiny-m7](https://huggingface.co/ada/tiny-m7)" in files["README.md"].decode()
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["models"] == ["ada/tiny-m7"]
    assert [*links_of(bare), *links_of(files)] == []


def test_a_space_may_ask_a_repository(tiny_family):
    files = space_files(str(tiny_family / "tiny-m7"), repo_id="ada/tiny-m7", revision="v1.0")
    assert set(files) == {"app.py", "README.md", "requirements.txt", "space.json"}
    assert json.loads(files["space.json"])["model"] == "ada/tiny-m7"
    assert json.loads(files["space.json"])["revision"] == "v1.0"
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["models"] == ["ada/tiny-m7"]


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("no such thing", {}, "no such folder"),
        (".", {"revision": "v1"}, "is a folder"),
        (".", {"repo_id": "x"}, "not a repository id"),
    ],
)
def test_wrong_use_is_told(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        space_files(source, **arguments)


def test_a_model_that_cannot_leave_is_refused(model, processor, tmp_path):
    folder = save_variant(tmp_path / "v", model, processor, 7, text="org/llm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_model_name_or_path": "/data/llm"}))
    with pytest.raises(ValueError, match="nobody else has"):
        space_files(str(folder))


def test_the_command_leaves_other_folders_alone(tiny_family, tmp_path):
    from typer.testing import CliRunner

    from fusedvlm.cli import app

    (tmp_path / "README.md").write_text("mine")
    result = CliRunner().invoke(app, ["space", str(tiny_family / "tiny-m7"), "--output", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert (tmp_path / "README.md").read_text() == "mine"
    result = CliRunner().invoke(app, ["space", str(tiny_family / "tiny-m7"), "--output", str(tmp_path / "space")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "space" / "model" / "config.json").exists()
    result = CliRunner().invoke(app, ["space", str(tiny_family / "tiny-m1"), "--output", str(tmp_path / "space")])
    assert result.exit_code == 0, result.output


@pytest.fixture
def launched(tiny_family, tmp_path):
    """Address of a running Space."""
    from fusedvlm.hub_cards.release.variant_release import write_file

    for name, content in space_files(str(tiny_family / "tiny-m7")).items():
        write_file(tmp_path / "space" / name, content)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "NO_PROXY": "*",
    }  # fmt: skip
    program = "import runpy, sys; sys.modules['fusedvlm'] = None; runpy.run_path('app.py', run_name='__main__')"
    with (tmp_path / "log").open("w") as log:
        app = subprocess.Popen(
            [fork_server.executable(), "-c", program], cwd=tmp_path / "space", env=environment, stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert app.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(20)


@needs_gradio
def test_a_running_space_answers_at_every_m(launched, model, processor, tmp_path):
    from gradio_client import Client, handle_file

    picture = tmp_path / "picture.png"
    tiny.picture(4).save(picture)
    client = Client(launched, verbose=False)
    for m in (1, 7, tiny.MAX_M):
        client.reset_session()  # else it would be a second question
        job = client.submit(handle_file(str(picture)), "what is it?", m, 3, True, 12, api_name="/ask")
        chat, other, words = job.result(timeout=60)
        for shown, count in ((chat, m), (other, 3)):
            text, cost = said(shown)
            assert cost.startswith(f"{count} visual tokens, ")
            assert re.search(r"\d+ new tokens, \d+\.\d\d s, \d+% confidence$", cost)
            assert text == expected(model, processor, picture, count).strip()
        assert words == ""
        assert len(job.outputs()) > 2  # it came piece by piece
    client.reset_session()
    chat, other, _ = client.predict(handle_file(str(picture)), "what is it?", 7, 3, False, 12, api_name="/ask")
    assert (len(chat), other) == (2, [])
    for arguments, message in (
        ((None, "what?"), "Choose an image"),
        ((handle_file(str(picture)), " "), "Ask something"),
        ((handle_file(str(picture)), "why " * 2000), "at most 4000"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*arguments, 7, 3, True, 12, api_name="/ask")


def said(chat) -> tuple[str, str]:
    """The last answer of a chat, and the line on what it cost."""
    content = chat[-1]["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    answer, cost = re.fullmatch(r"(.*)\n\n\((.*)\)", text, re.DOTALL).groups()
    return answer.strip(), cost


def expected(model, processor, picture, m) -> str:
    """The package's own answer."""
    from PIL import Image

    messages = [tiny.user(Image.open(picture).convert("RGB"), text="what is it?")]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"num_visual_tokens": m},
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

"""What can be said of the vLLM engine without vLLM; its answers are compared in `make test-vllm`."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from fusedvlm.serving.vllm_plugin import RANGE, check_version, register
from fusedvlm.serving.vllm_serve import run_vllm, vllm_command
from fusedvlm.tests import fork_server


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1"])
def test_supported_versions_pass(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "0.9.2", "dev"])
def test_other_versions_are_refused_with_the_range(version):
    with pytest.raises(ValueError, match=r"vllm>=0\.32,<0\.34"):
        check_version(version)
    assert RANGE == "vllm>=0.32,<0.34"


def test_vllm_finds_the_plugin():
    (point,) = entry_points(group="vllm.general_plugins", name="fusedvlm")
    assert point.load() is register


def test_without_vllm_the_command_says_so(variant):
    done = subprocess.run(
        [fork_server.executable("fusedvlm"), "serve", str(variant), "--engine", "vllm"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "vllm>=0.32,<0.34" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_become_options_of_vllm_and_the_key_none(monkeypatch, tmp_path):
    """A key on the command line would be read by everybody on the machine."""
    words = vllm_command(
        "ada/tiny", host="0.0.0.0", port=1, name=None, revision="abc", dtype="auto", max_images=2,
        arguments=["--tensor-parallel-size=2"],
    )  # fmt: skip
    assert words[:2] == ["serve", "ada/tiny"]
    assert words[-1] == "--tensor-parallel-size=2"
    assert words[words.index("--limit-mm-per-prompt") :][:2] == ["--limit-mm-per-prompt", '{"image": 2}']
    started = {}
    from fusedvlm.serving import vllm_serve

    (tmp_path / "vllm").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(vllm_serve, "installed_vllm", lambda: "0.33.0")
    monkeypatch.setattr(vllm_serve.os, "execve", lambda *given: started.update(words=given[1], environment=given[2]))
    run_vllm(
        "ada/tiny", api_key="sk-secret", cache_mb=7, max_image_mb=1, max_megapixels=2, image_urls=False,
        private_image_urls=False, host="h", port=1, name="n", revision=None, dtype="auto", max_images=1, arguments=[],
    )  # fmt: skip
    assert "sk-secret" not in " ".join(started["words"])
    assert started["environment"]["VLLM_API_KEY"] == "sk-secret"
    assert started["environment"]["FUSEDVLM_CACHE_MB"] == "7"
    assert '"allow_urls": false' in started["environment"]["FUSEDVLM_IMAGE_LIMITS"]

"""Start `vllm serve` with our plugin: a check of its version, our settings as its options, and then it is vLLM."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .vllm_plugin import check_version, installed_vllm


def vllm_command(
    model: str,
    *,
    host: str,
    port: int,
    name: str | None,
    revision: str | None,
    dtype: str,
    max_images: int,
    arguments: list[str],
) -> list[str]:
    """The words of `vllm serve`, without the API key, which belongs in the environment."""
    words = ["serve", model, "--host", host, "--port", str(port), "--served-model-name", name or model]
    words += ["--dtype", dtype, "--limit-mm-per-prompt", json.dumps({"image": max_images})]
    words += ["--revision", revision] if revision else []
    return [*words, *arguments]


def run_vllm(
    model: str,
    *,
    api_key: str | None,
    cache_mb: int,
    max_image_mb: int,
    max_megapixels: int,
    image_urls: bool,
    private_image_urls: bool,
    **options: Any,
) -> None:
    """Become `vllm serve`: its own signals, exit code, `/health` and `/metrics`.

    Raises:
        ValueError: when no supported vLLM is installed beside this package.
    """
    check_version(installed_vllm())
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.exists() else shutil.which("vllm")
    if program is None:
        raise ValueError("vLLM is installed, but its command `vllm` is not; install vLLM again.")
    limits = {
        "max_bytes": max_image_mb * 2**20,
        "max_pixels": max_megapixels * 10**6,
        "allow_urls": image_urls,
        "allow_private": private_image_urls,
    }
    environment = {
        **os.environ,
        "FUSEDVLM_IMAGE_LIMITS": json.dumps(limits),
        "FUSEDVLM_CACHE_MB": str(cache_mb),
        "VLLM_MEDIA_CONNECTOR": "fusedvlm",
        **({"VLLM_API_KEY": api_key} if api_key else {}),
    }
    words = vllm_command(model, **options)
    os.execve(program, [program, *words], environment)

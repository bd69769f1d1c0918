"""`fusedvlm serve`."""

from enum import Enum
from importlib.util import find_spec
from typing import Annotated

import typer

from fusedvlm import serving
from fusedvlm.model_source import require_source

MEBIBYTE = 2**20


class EngineName(str, Enum):
    """Where the language model runs."""

    transformers = "transformers"
    embeds = "embeds"
    vllm = "vllm"


def serve(
    model: Annotated[str, typer.Argument(help="Variant folder or Hub repository.")],
    engine: Annotated[
        EngineName,
        typer.Option(
            help="transformers: the whole model in this process. embeds: views and fusion here, the language model on "
            "any vLLM server with prompt embeddings (--llm-url). vllm: all in vLLM, by our plugin."
        ),
    ] = EngineName.transformers,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FUSEDVLM_API_KEY", help="What clients must show as their API key.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; MODEL by default.")] = None,
    llm_url: Annotated[
        str | None, typer.Option(help="embeds: the language model's server, e.g. http://10.0.0.2:8000.")
    ] = None,
    llm_api_key: Annotated[
        str | None, typer.Option(envvar="FUSEDVLM_LLM_API_KEY", help="embeds: that server's API key.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the repository.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as saved.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 1024,
    max_queue: Annotated[int, typer.Option(min=1, help="Most requests at once; more get 429.")] = 64,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a request.")] = 16,
    max_image_mb: Annotated[int, typer.Option(min=1, help="Most megabytes of an image.")] = 20,
    max_image_megapixels: Annotated[int, typer.Option(min=1, help="Most megapixels of an image.")] = 50,
    image_urls: Annotated[bool, typer.Option(help="Fetch images named by https address.")] = True,
    private_image_urls: Annotated[
        bool, typer.Option(help="Fetch from addresses of this machine and of private networks too, and plain http.")
    ] = False,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="Megabytes kept of images: views, fusion, visual tokens.")
    ] = 1024,
    language_cache_mb: Annotated[
        int, typer.Option(min=0, help="transformers: megabytes kept of conversations in the language model.")
    ] = 1024,
    round_down: Annotated[
        bool, typer.Option("--round-down", help="Where an m was not trained, serve the next smaller one that was.")
    ] = False,
    vllm_args: Annotated[
        list[str] | None,
        typer.Option("--vllm", help="vllm: an argument of its own, e.g. --vllm=--tensor-parallel-size=2."),
    ] = None,
) -> None:
    """Serve a variant to OpenAI clients: chat with images, any m per request.

    A request chooses m by extra_body={"chat_template_kwargs": {"processor_kwargs": {"num_visual_tokens": 4}}}.

    Example: fusedvlm serve DIR --port 8000 --api-key SECRET
    """
    require_source("MODEL", model, "config.json")
    if engine is EngineName.embeds and not llm_url:
        raise ValueError(
            "--engine embeds needs --llm-url, the server of the frozen LLM: vllm serve LLM --enable-prompt-embeds"
        )
    if engine is not EngineName.embeds and (llm_url or llm_api_key):
        raise ValueError(f"--llm-url and --llm-api-key are for --engine embeds, not for {engine.value}.")
    if engine is not EngineName.vllm and vllm_args:
        raise ValueError(f"--vllm is for --engine vllm, not for {engine.value}.")
    if engine is EngineName.vllm and round_down:
        raise ValueError("--round-down is not for --engine vllm; ask for an m that was trained.")
    if engine is EngineName.vllm:
        serving.run_vllm(
            model, host=host, port=port, api_key=api_key, name=name, revision=revision, dtype=dtype,
            max_images=max_images, cache_mb=cache_mb, max_megapixels=max_image_megapixels, image_urls=image_urls,
            private_image_urls=private_image_urls, max_image_mb=max_image_mb, arguments=vllm_args or [],
        )  # fmt: skip
        return
    missing = [module for module in ("starlette", "uvicorn", "httpx", "prometheus_client") if find_spec(module) is None]
    if missing:
        raise ValueError(f"fusedvlm serve needs {', '.join(missing)}: pip install 'fusedvlm[serve]'")
    options = serving.LocalOptions(
        model, revision, device, dtype, name or model, api_key, llm_url, llm_api_key, max_tokens, max_queue, max_images,
        max_image_mb * MEBIBYTE, max_image_megapixels * 10**6, image_urls, private_image_urls, cache_mb * MEBIBYTE,
        language_cache_mb * MEBIBYTE, round_down,
    )  # fmt: skip
    serving.run_server(serving.build_server(options), host, port)

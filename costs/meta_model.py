"""A variant's model without memory for its weights: its parameters by group, whatever it is made of."""

import json

import torch
from transformers import AutoConfig

from fusedvlm.model_source import require_source
from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import LANGUAGE_PREFIXES, VISION_PREFIXES


def count_parameters(config: FusedVLMConfig) -> dict[str, int]:
    """Parameters by group; tied weights count once. The groups add up to the model.

    Raises:
        ValueError: when a parameter belongs to no group.
    """
    with torch.device("meta"):
        model = FusedVLMForConditionalGeneration(config)
    model.tie_weights()
    groups = {
        "vision": VISION_PREFIXES,
        **config.connector_class.parameter_groups,
        "language model": LANGUAGE_PREFIXES,
    }
    counts = dict.fromkeys(groups, 0)
    for name, parameter in model.named_parameters():
        group = next((group for group, prefixes in groups.items() if name.startswith(prefixes)), None)
        if group is None:
            raise ValueError(f"Parameter {name} belongs to no group.")
        counts[group] += parameter.numel()
    return counts


def read_variant_config(model: str, revision: str | None = None) -> FusedVLMConfig:
    """The configuration of a folder or repository. Raises `ValueError` when there is no readable one of a variant."""
    require_source("model", model, "config.json")
    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{model}: its configuration cannot be read: {str(error).splitlines()[0]}") from error
    if config.model_type != "fusedvlm":
        raise ValueError(f"{model}: a {config.model_type} model, not a FusedVLM variant.")
    return config

"""What a variant is, read from its configuration alone (the model is built without memory for its weights)."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig

import fusedvlm.modeling_fusedvlm  # noqa: F401 - registers the configuration
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import LANGUAGE_PREFIXES, VISION_PREFIXES


def count_parameters(config) -> dict[str, int]:
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


def describe_variant(model: str, revision: str | None = None) -> dict:
    """Facts about a variant, ready for JSON.

    Raises:
        ValueError: when there is no readable FusedVLM configuration.
    """
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"{model}: not a variant, config.json is missing.")
    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{model}: its configuration cannot be read: {str(error).splitlines()[0]}") from error
    if config.model_type != "fusedvlm":
        raise ValueError(f"{model}: a {config.model_type} model, not a FusedVLM variant.")
    counts = count_parameters(config)
    kind, sizes = config.connector_class, config.connector_class.describe(config)
    return {
        "model": model,
        "connector": {"name": config.connector, "counts_per_view": kind.per_view, **sizes},
        "num_visual_tokens": config.num_visual_tokens,
        "num_followup_visual_tokens": config.num_followup_visual_tokens,
        "trained_num_visual_tokens": sorted(config.trained_num_visual_tokens),
        "fuse_question": config.fuse_question,
        "max_local_views": config.max_local_views,
        "tokens_per_view": config.tokens_per_view,
        "image_size": config.vision_config.image_size,
        "widths": {
            "vision": config.vision_config.hidden_size,
            **({"fusion": sizes["width"]} if "width" in sizes else {}),
            "language_model": config.text_config.hidden_size,
        },
        "layers": {
            "vision": config.vision_config.num_hidden_layers,
            **({"fusion": sizes["layers"]} if "layers" in sizes else {}),
            "language_model": config.text_config.num_hidden_layers,
        },
        "backbones": {
            "vision": {
                "type": config.vision_config.model_type,
                "from": config.vision_model_name_or_path,
                "revision": config.vision_model_revision,
            },
            "language_model": {
                "type": config.text_config.model_type,
                "from": config.text_model_name_or_path,
                "revision": config.text_model_revision,
            },
        },
        "parameters": {**counts, "total": sum(counts.values())},
    }


def render_info(facts: dict) -> str:
    """The facts as lines for a terminal."""
    trained = ", ".join(str(m) for m in facts["trained_num_visual_tokens"])
    connector = facts["connector"]
    sizes = [f"{name} {value}" for name, value in connector.items() if name not in ("name", "counts_per_view")]
    each = " per view" if connector["counts_per_view"] else ""
    lines = [
        facts["model"],
        f"  connector           {', '.join([connector['name'], *sizes])}",
        f"  visual tokens       {facts['num_visual_tokens']} first, {facts['num_followup_visual_tokens']} for later "
        f"questions{each}; trained with {trained}",
        f"  connector reads     {'views and question' if facts['fuse_question'] else 'views only'}",
        f"  views               1 global + up to {facts['max_local_views']} local of {facts['image_size']} pixels, "
        f"{facts['tokens_per_view']} tokens each",
    ]
    for name, backbone in facts["backbones"].items():
        source = backbone["from"] or "inside this variant"
        at = f" at {backbone['revision']}" if backbone["revision"] else ""
        lines.append(f"  {name.replace('_', ' '):<19} {backbone['type']} from {source}{at}")
    for group, count in facts["parameters"].items():
        lines.append(f"  parameters, {group:<15} {count:>15,}")
    return "\n".join(lines)

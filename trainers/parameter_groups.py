"""The one place that decides which parameters learn at which stage, and at which learning rate."""

from dataclasses import dataclass

from peft import PeftModel
from torch import nn

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import (
    CONNECTOR_PREFIXES,
    CONTRASTIVE_PREFIXES,
    PROJECTOR_PREFIX,
    VISION_PREFIXES,
)

# Module prefixes that learn at each stage (paper appendix C). The LLM never does.
STAGES = {
    "contrastive": (*VISION_PREFIXES, *CONNECTOR_PREFIXES, *CONTRASTIVE_PREFIXES),
    "generation": (*VISION_PREFIXES, *CONNECTOR_PREFIXES, PROJECTOR_PREFIX),
}
NO_DECAY_ENDINGS = (
    ".bias",
    "norm.weight",
    "layernorm.weight",
    "layer_norm1.weight",
    "layer_norm2.weight",
    "layrnorm.weight",
)


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    parameters: list[nn.Parameter]
    names: list[str]
    learning_rate: float
    weight_decay: float


def select_trainable(model: nn.Module, stage: str, freeze: tuple[str, ...] = ()) -> list[str]:
    """Switch gradients on for exactly the parameters that learn at a stage.

    On a model with adapters exactly they learn, with the modules that peft trains whole beside them
    (`modules_to_save`), whatever the stage.

    Args:
        model: the model of that stage.
        stage: "contrastive" or "generation".
        freeze: further module prefixes to keep fixed, e.g. `("model.vision_tower.",)`.

    Returns:
        Names of the parameters that learn, in model order.

    Raises:
        ValueError: for an unknown stage, a `freeze` prefix that matches nothing, or nothing left to learn.
    """
    if stage not in STAGES:
        raise ValueError(f"Unknown stage {stage!r}; stages are {sorted(STAGES)}.")
    names = [name for name, _ in model.named_parameters()]
    for prefix in freeze:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"freeze={prefix!r} matches no parameter; modules are {_modules(names)}.")
    has_adapters = isinstance(model, PeftModel)
    unread = set() if has_adapters else _unread_parameters(model)
    trainable = []
    for name, parameter in model.named_parameters():
        # CODEPATH: peft has switched gradients on for what it added; everything else follows from the stage.
        learns = parameter.requires_grad if has_adapters else name.startswith(STAGES[stage])
        learns = learns and not name.startswith(freeze or ("\0",)) and name not in unread
        parameter.requires_grad_(learns)
        if learns:
            trainable.append(name)
    if not trainable:
        raise ValueError(f"Nothing is left to learn at stage {stage!r} with freeze={freeze}.")
    return trainable


def _unread_parameters(model: nn.Module) -> set[str]:
    """Parameters of the vision tower that the connector does not read, and that no gradient can reach."""
    base = getattr(model, "model", None)
    connector, tower = getattr(base, "connector", None), getattr(base, "vision_tower", None)
    if connector is None or tower is None:
        return set()
    return {f"model.vision_tower.{name}" for name in connector.unread_parameters(tower)}


def group_parameters(
    model: nn.Module, learning_rate: float, weight_decay: float, vision_learning_rate: float | None = None
) -> list[ParameterGroup]:
    """Parameters that require gradients, by learning rate (vision tower or not) and weight decay."""
    groups: dict[tuple[str, bool], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vision = name.removeprefix("base_model.model.").startswith("model.vision_tower.")
        decays = not name.endswith(NO_DECAY_ENDINGS)
        rate = vision_learning_rate if is_vision and vision_learning_rate is not None else learning_rate
        part = "vision" if is_vision else "fusion"
        key = (part, decays)
        if key not in groups:
            label = f"{part}, {'decay' if decays else 'no decay'}"
            groups[key] = ParameterGroup(label, [], [], rate, weight_decay if decays else 0.0)
        groups[key].parameters.append(parameter)
        groups[key].names.append(name)
    return list(groups.values())


def describe_groups(groups: list[ParameterGroup]) -> str:
    """One line per group, for the log."""
    return "\n".join(
        f"  {group.name}: {sum(p.numel() for p in group.parameters):,} parameters in {len(group.names)} tensors, "
        f"learning rate {group.learning_rate:g}, weight decay {group.weight_decay:g}"
        for group in groups
    )


def _modules(names: list[str]) -> list[str]:
    return sorted({".".join(name.split(".")[:2]) for name in names})

"""What a variant is, read from its configuration alone: plainly where that says all, else by building the model.

One description serves `fusedvlm info`, the facts of cards and the comparison of both: a new field of the configuration
is added to `VariantDescription` and shown by its `rows`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fusedvlm.lazy import late_function
from fusedvlm.model_source import HUB_ID, require_source
from fusedvlm.wording import name_counts

from .plain_config import read_plainly

# Both build a model without memory for its weights, for which PyTorch is imported: only where a file does not say all.
count_parameters = late_function("fusedvlm.costs.meta_model", "count_parameters")
read_variant_config = late_function("fusedvlm.costs.meta_model", "read_variant_config")


@dataclass(frozen=True)
class Backbone:
    """A tower: its type, and where it is from. `revision` is a commit, `license` what its publisher says."""

    type: str
    repo: str | None
    revision: str | None
    license: str | None = None

    @property
    def hub_id(self) -> str | None:
        """The repository on the Hub, None for towers that are published nowhere."""
        return self.repo if self.repo is not None and HUB_ID.fullmatch(self.repo) else None


@dataclass(frozen=True, kw_only=True)
class VariantDescription:
    """What follows from a variant's configuration.

    Args:
        num_visual_tokens, num_followup_visual_tokens: m and m'.
        trained_num_visual_tokens: every m the weights were trained with.
        trained_num_visual_tokens_is_range: whether every m between the first and the last of these was trained.
        parameters: all parameters by group; the groups add up to the model.
        connector, connector_summary: how view tokens become visual tokens, and that in a sentence; no sentence for the
            fused one.
        counts_per_view: whether m counts the tokens of each view.
        possible_num_visual_tokens: every m there is, where it is not simply 1 to the largest trained one.
        fusion_row_per_turn: whether each question about an image is read on a fusion row of its own.
    """

    num_visual_tokens: int
    num_followup_visual_tokens: int
    trained_num_visual_tokens: tuple[int, ...]
    max_local_views: int
    image_size: int
    tokens_per_view: int
    fuse_question: bool
    parameters: Mapping[str, int]
    vision: Backbone
    language_model: Backbone
    connector: str = "fused"
    connector_summary: str | None = None
    counts_per_view: bool = False
    possible_num_visual_tokens: tuple[int, ...] = ()
    trained_num_visual_tokens_is_range: bool | None = None
    fusion_row_per_turn: bool = False

    def rows(self) -> dict[str, str]:
        """Label -> text, as cards and `fusedvlm info` show it."""
        connector = {} if self.connector_summary is None else {"Connector": self.connector}
        if self.counts_per_view:
            connector["Visual tokens are counted"] = "per view"
        return {
            **connector,
            "Visual tokens m": str(self.num_visual_tokens),
            "Later questions about an image": f"{self.num_followup_visual_tokens}{self._turns()}",
            "Trained with m": self._trained(),
            **self._reads(),
            "Views per image": f"1 + up to {self.max_local_views}, {self.image_size} x {self.image_size} pixels, "
            f"{self.tokens_per_view} tokens each",
            "Parameters": f"{sum(self.parameters.values()):,}",
            **{f"Parameters, {group}": f"{count:,}" for group, count in self.parameters.items()},
        }

    def _trained(self) -> str:
        if self.trained_num_visual_tokens_is_range:
            return f"every one from {self.trained_num_visual_tokens[0]} to {self.trained_num_visual_tokens[-1]}"
        return name_counts(self.trained_num_visual_tokens)

    def _turns(self) -> str:
        is_own = self.fusion_row_per_turn and self.connector_summary is None  # other connectors have no fusion rows
        return ", each question on a fusion row of its own" if is_own else ""

    def _reads(self) -> dict[str, str]:
        if self.connector_summary is None:
            inputs = "views, question and queries" if self.fuse_question else "views and queries"
            return {"Fusion module reads": inputs}
        return {"Connector reads": "views and question" if self.fuse_question else "views"}


def describe_config(config: Any) -> dict[str, Any]:
    """The fields of `VariantDescription`, by name, of a `FusedVLMConfig` or a `PlainConfig`."""
    kind = config.connector_class
    possible = tuple(m for m in kind.counts(config) if m <= config.max_num_visual_tokens)
    derived = {
        "trained_num_visual_tokens": tuple(sorted(set(config.trained_num_visual_tokens))),
        "image_size": config.vision_config.image_size,
        "parameters": getattr(config, "plain_parameters", None) or count_parameters(config),
        "vision": _backbone(config, "vision"),
        "language_model": _backbone(config, "text"),
        "connector_summary": kind.summary,
        "counts_per_view": kind.per_view,
        "possible_num_visual_tokens": () if possible == tuple(range(1, possible[-1] + 1)) else possible,
    }
    same_name = {field.name for field in fields(VariantDescription)} - set(derived)
    return {name: getattr(config, name) for name in same_name} | derived


def _backbone(config: Any, role: str) -> Backbone:
    return Backbone(
        getattr(config, f"{role}_config").model_type,
        getattr(config, f"{role}_model_name_or_path"),
        getattr(config, f"{role}_model_revision"),
    )


def _read(model: str, revision: str | None) -> Any:
    """Its configuration, plain where it can be. Raises `ValueError` when there is no readable one of a variant."""
    require_source("model", model, "config.json")
    return read_plainly(model) or read_variant_config(model, revision)


def describe_variant(model: str, revision: str | None = None) -> dict[str, Any]:
    """Facts about a variant, ready for JSON.

    Raises:
        ValueError: when there is no readable FusedVLM configuration.
    """
    config = _read(model, revision)
    facts = asdict(VariantDescription(**describe_config(config)))
    sizes = config.connector_class.describe(config)
    towers = {"vision": facts.pop("vision"), "language_model": facts.pop("language_model")}
    facts["connector"] = {
        "name": facts.pop("connector"),
        "summary": facts.pop("connector_summary"),
        "counts_per_view": facts.pop("counts_per_view"),
        **sizes,
    }
    return {
        "model": model,
        **facts,
        "widths": _by_part(config, "hidden_size", sizes.get("width")),
        "layers": _by_part(config, "num_hidden_layers", sizes.get("layers")),
        "backbones": {
            name: {"type": tower["type"], "from": tower["repo"], "revision": tower["revision"]}
            for name, tower in towers.items()
        },
        "parameters": {**facts["parameters"], "total": sum(facts["parameters"].values())},
    }


def _by_part(config: Any, name: str, fusion: int | None) -> dict[str, int]:
    return {
        "vision": getattr(config.vision_config, name),
        **({} if fusion is None else {"fusion": fusion}),
        "language_model": getattr(config.text_config, name),
    }


def render_info(model: str, revision: str | None = None) -> str:
    """The facts as lines for a terminal. Raises as `describe_variant`."""
    config = _read(model, revision)
    described = VariantDescription(**describe_config(config))
    sizes = [f"{name} {value}" for name, value in config.connector_class.describe(config).items()]
    rows = {**described.rows(), "Connector": ", ".join([described.connector, *sizes])}
    for label, tower in (("Vision tower", described.vision), ("Language model", described.language_model)):
        at = f" at {tower.revision}" if tower.revision else ""
        rows[label] = f"{tower.type} from {tower.repo or 'inside this variant'}{at}"
    width = max(map(len, rows))
    return "\n".join([model, *(f"  {label:<{width}}  {text}" for label, text in rows.items())])

"""`build_dataset`: what a recipe holds under `data:`, as a dataset for `Trainer`."""

from typing import Any

from fusedvlm.data.mixing.mixture import Mixture
from fusedvlm.data.mixing.streaming import SHUFFLE_BLOCK, StreamingMixture
from fusedvlm.files import read_yaml
from fusedvlm.wording import shown

from .source_spec import RowStream, SourceSpec, load_source

OPTIONS = ("seed", "stop", "temperature", "shuffle_block")
RECIPE_KEYS = ("mixture_seed", "fraction", "fraction_seed", "eval_sources")


def parse_data_spec(
    spec: dict[str, Any] | list[dict[str, Any]] | SourceSpec,
) -> tuple[list[SourceSpec], dict[str, Any]]:
    """Sources and mixture options of a data section.

    Args:
        spec: `{"sources": [source, ...], "seed": 0, "stop": ..., "temperature": ..., "shuffle_block": ...}`, a list of
            sources, or one source. `{"data": ...}` around any of them is opened.

    Raises:
        ValueError: for keys that do not exist, no sources, or weights for some sources only.
    """
    if isinstance(spec, dict) and "data" in spec and "type" not in spec:
        spec = spec["data"]
    if isinstance(spec, SourceSpec) or (isinstance(spec, dict) and "sources" not in spec and "type" in spec):
        spec = {"sources": [spec]}
    if isinstance(spec, list):
        spec = {"sources": spec}
    if not isinstance(spec, dict) or not isinstance(spec.get("sources"), list) or not spec["sources"]:
        raise ValueError(f"A data section needs a list 'sources:' of mappings with type and path, got {shown(spec)}.")
    unknown = sorted(set(spec) - {"sources", *OPTIONS})
    if unknown:
        raise ValueError(
            f"Unknown keys {', '.join(unknown)} in the data section; known: sources, {', '.join(OPTIONS)}."
        )
    sources = [SourceSpec.parse(source) for source in spec["sources"]]
    weighted = [source.label for source in sources if source.weight is not None]
    if 0 < len(weighted) < len(sources):
        raise ValueError(
            f"Only {', '.join(weighted)} has a weight; give one to every source of the mixture or to none."
        )
    return sources, {key: spec[key] for key in OPTIONS if spec.get(key) is not None}


def build_dataset(spec: dict[str, Any] | list[dict[str, Any]] | SourceSpec) -> Mixture | StreamingMixture:
    """The training set of a data section.

    Args:
        spec: see `parse_data_spec`.

    Returns:
        A map-style `Mixture`, or an endless `StreamingMixture` when any source is streamed. Samples are those of
        `fusedvlm.data.records` with `id` and `source`; images are paths or bytes.

    Raises:
        ValueError: for wrong specs, missing files, malformed rows; see `load_source`.
    """
    specs, options = parse_data_spec(spec)
    sources = [load_source(source) for source in specs]
    common: dict[str, Any] = {
        "weights": [source.weight for source in specs] if specs[0].weight is not None else None,
        "names": distinct_names([source.label for source in specs]),
    }
    if any(isinstance(source, RowStream) for source in sources):
        # Trainer cannot skip across the end of a stream, so by default there is none.
        return StreamingMixture(sources, **{"stop": "never", "shuffle_block": SHUFFLE_BLOCK, **options, **common})
    if "shuffle_block" in options:
        raise ValueError("shuffle_block is for streamed sources; sized ones are shuffled whole.")
    return Mixture(sources, **options, **common)


def distinct_names(labels: list[str]) -> list[str]:
    """Labels, numbered where two are the same."""
    return [
        f"{label}#{labels[:place].count(label) + 1}" if labels.count(label) > 1 else label
        for place, label in enumerate(labels)
    ]


def read_spec(path: str) -> dict[str, Any] | list[dict[str, Any]]:
    """The data section of a YAML file: the file itself, or what a recipe has under `data:`.

    Raises:
        ValueError: naming the file that is missing or not YAML.
    """
    document = read_yaml(path, None)
    return recipe_section(document["data"]) if isinstance(document, dict) and "data" in document else document


def recipe_section(section: Any) -> Any:
    """A recipe's data section as one of ours: its `mixture_seed` is the seed, its `fraction` counts for every source.

    Evaluation sources are not part of it.
    """
    if not isinstance(section, dict) or not isinstance(section.get("sources"), list):
        return section
    rest = {key: value for key, value in section.items() if key not in RECIPE_KEYS}
    if "mixture_seed" in section:
        rest["seed"] = section["mixture_seed"]
    part = float(section.get("fraction", 1))
    if part != 1:
        common = {"seed": section.get("fraction_seed", 0)}
        rest["sources"] = [
            {**common, **source, "fraction": float(source.get("fraction", 1)) * part} for source in section["sources"]
        ]
    return rest

"""Recipes: a training run as one YAML file that states only what differs from its base.

    stage: generation            contrastive, generation or variants
    base: generation.yaml        another recipe, merged first: a shipped name, or a path relative to this file
    preset: single_gpu           a shipped preset, or a path; merged between the base and this file
    model: / data: / run: / variants: / training:    the fields of the argument dataclasses

Mappings merge key by key, everything else replaces; `null` goes back to the default. `${oc.env:NAME}` is the value of
an environment variable, `${model.num_visual_tokens}` that of another field (OmegaConf's interpolation). A field may
stand at the top level without its section, as in TRL's flat files.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusedvlm.files import read_yaml
from fusedvlm.trainers.recipes import FOLDER
from fusedvlm.wording import fit, shown

from .field_names import training_fields
from .run_arguments import DataArguments, ModelArguments, RunArguments, VariantArguments

STAGES = ("contrastive", "generation", "variants")
SECTION_TYPES: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "run": RunArguments,
    "variants": VariantArguments,
}
SECTIONS = (*SECTION_TYPES, "training")
HEADERS = ("stage", "base", "preset")
# What m is drawn from: these counts, or every integer of this range.
ALTERNATIVES = ("elastic_num_visual_tokens", "elastic_range")


@dataclass
class Recipe:
    """A recipe with its bases, preset and overrides merged.

    Args:
        stage: contrastive, generation or variants.
        sections: {section: {field: value}}, only what was stated somewhere.
        source: the file it was read from, for messages.
    """

    stage: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: str = "recipe"

    def resolved(self) -> "Recipe":
        """The recipe with its `${...}` filled in.

        Raises:
            ValueError: for one that names nothing.
        """
        with one_line_errors(self.source):
            sections: Any = OmegaConf.to_container(OmegaConf.create(self.sections), resolve=True)
        return Recipe(self.stage, sections, self.source)

    def to_yaml(self) -> str:
        """YAML that reads back as the same recipe."""
        document = {"stage": self.stage, **{name: values for name, values in self.sections.items() if values}}
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def shipped_recipes() -> dict[str, Path]:
    """Names of the shipped recipes and their files, bases left out."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "base"}


def shipped_presets() -> dict[str, Path]:
    """Names of the shipped presets and their files."""
    return {path.stem: path for path in sorted((FOLDER / "presets").glob("*.yaml"))}


def load_recipe(name: str | Path, preset: str | Path | None = None) -> Recipe:
    """Read a recipe and everything it stands on.

    Args:
        name: a shipped recipe's name (`generation`) or the path of a file.
        preset: a shipped preset's name or the path of one, merged over the recipe.

    Raises:
        ValueError: for a name, key, stage or base that does not exist, or bases that form a circle.
    """
    path = find_recipe(name, FOLDER)
    merged = _load_merged(path, ())
    if merged.get("stage") not in STAGES:
        raise ValueError(f"{path}: stage must be one of {', '.join(STAGES)}, got {shown(merged.get('stage'))}.")
    # Once more as a whole: a field of a base may not exist at this stage.
    recipe = Recipe(merged["stage"], place_sections(merged, merged["stage"], str(path)), str(path))
    if preset is not None:
        apply_preset(recipe, preset, stated_data(path))
    return recipe


def apply_preset(recipe: Recipe, preset: str | Path, own_data: dict[str, Any] | None = None) -> None:
    """Merge a preset's settings for the recipe's stage over the recipe, in place.

    A preset is about machines and sizes. What it says about data stands in for the shipped recipes' only: `own_data`,
    what the user's own files say, is never overridden.

    A preset has parts `common`, `contrastive`, `generation` and `variants`; stage 3 takes `generation` and then its
    own.
    """
    settings = preset_settings(preset, recipe.stage)
    recipe.sections = merge(merge(recipe.sections, settings), {"data": own_data} if own_data else {})


def preset_settings(preset: str | Path, stage: str) -> dict[str, dict]:
    """What a preset states for a stage."""
    path = find_recipe(preset, FOLDER / "presets")
    parts = read_yaml(path)
    unknown = set(parts) - {"common", *STAGES}
    if unknown:
        raise ValueError(f"{path}: {did_you_mean(sorted(unknown)[0], ['common', *STAGES])}")
    settings: dict = {}
    wanted = {"contrastive": ["contrastive"], "generation": ["generation"], "variants": ["generation", "variants"]}
    for part in ["common", *wanted[stage]]:
        settings = merge(settings, place_sections(parts.get(part) or {}, stage, str(path)))
    return settings


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: mappings key by key, anything else replaces. Neither argument is modified.

    Raises:
        ValueError: for a text with a broken `${...}`.
    """
    with one_line_errors("recipe"):
        kept = OmegaConf.create(base)
        _drop_replaced_towers(kept, changes)
        _drop_alternatives(kept, changes)
        merged: Any = OmegaConf.to_container(OmegaConf.merge(kept, changes))
        return merged


def _drop_replaced_towers(base: DictConfig, changes: dict[str, Any]) -> None:
    """A tower is one thing: sizes of one with the type of another are neither. A list and fields do not mix."""
    for key, value in changes.items():
        if not isinstance(value, (dict, list)) or not OmegaConf.is_config(base.get(key)):
            continue
        if OmegaConf.is_dict(base[key]) != isinstance(value, dict) or "model_type" in value:
            base[key] = None
        elif isinstance(value, dict):
            _drop_replaced_towers(base[key], value)


def _drop_alternatives(base: dict[str, Any] | DictConfig, changes: dict[str, Any]) -> None:
    """Two fields that say one thing: stating one takes back what the base said by the other."""
    for one, other in (ALTERNATIVES, ALTERNATIVES[::-1]):
        if changes.get(one) is not None and other not in changes and base.get(other) is not None:
            base[other] = None
    for section, values in changes.items():
        if isinstance(values, dict) and (isinstance(base.get(section), dict) or OmegaConf.is_dict(base.get(section))):
            _drop_alternatives(base[section], values)


@contextmanager
def one_line_errors(where: str) -> Iterator[None]:
    """OmegaConf's errors as one line that begins with `where`."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}.") from None


def place_sections(document: dict, stage: str, source: str) -> dict[str, dict]:
    """A file's body with every field in its section and every name checked.

    Raises:
        ValueError: for a name that no dataclass of the stage has, with the closest one that exists.
    """
    known = fields_of(stage)
    placed: dict[str, dict] = {}
    for key, value in document.items():
        if key in HEADERS:
            continue
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{source}: section {key!r} must hold fields, got {shown(value)}.")
            section, values = key, value
        else:
            section, values = section_of(key, known, source), {key: value}
        for name in values:
            if name not in known[section]:
                choices = [f"{s}.{n}" for s, names in known.items() for n in names]
                raise ValueError(f"{source}: {did_you_mean(f'{section}.{name}', choices)}")
        placed[section] = merge(placed.get(section, {}), values)
    return placed


def section_of(name: str, known: dict[str, list[str]], source: str) -> str:
    """The one section that has a field."""
    homes = [section for section, names in known.items() if name in names]
    if len(homes) == 1:
        return homes[0]
    if homes:
        raise ValueError(f"{source}: {name!r} is a field of {' and '.join(homes)}; write {homes[0]}.{name}.")
    choices = [*SECTIONS, *(n for names in known.values() for n in names)]
    raise ValueError(f"{source}: {did_you_mean(name, choices)}")


def fields_of(stage: str) -> dict[str, list[str]]:
    """{section: names of its fields} at a stage."""
    sections = {name: [entry.name for entry in fields(kind)] for name, kind in SECTION_TYPES.items()}
    if stage != "variants":
        del sections["variants"]
    return {**sections, "training": list(training_fields(stage))}


def set_field(recipe: Recipe, dotted: str, value: Any) -> None:
    """Override one value, e.g. `training.learning_rate`, `learning_rate`, `model.fuser_config.num_hidden_layers`.

    Raises:
        ValueError: for a field that does not exist, or a path through something that is not a mapping or list.
    """
    parts = dotted.replace("-", "_").split(".")
    known = fields_of(recipe.stage)
    if parts[0] not in SECTIONS or (len(parts) == 1):
        parts.insert(0, section_of(parts[0], known, f"--{dotted}"))
    place_sections({parts[0]: {parts[1]: None}}, recipe.stage, f"--{dotted}")
    with one_line_errors(f"--{dotted}"):
        config = OmegaConf.create(recipe.sections)
        for depth in range(2, len(parts)):
            _check_step(config, parts[:depth], parts[depth], dotted)
        if len(parts) == 2:
            _drop_alternatives(config, {parts[0]: {parts[1]: value}})
        OmegaConf.update(config, ".".join(parts), value, merge=False)
        sections: Any = OmegaConf.to_container(config)
        recipe.sections = sections


def _check_step(config: DictConfig, path: list[str], key: str, dotted: str) -> None:
    """Refuse a path through a plain value, and a place that a list does not have."""
    inner = OmegaConf.select(config, ".".join(path))
    if inner is None:
        return
    if not OmegaConf.is_config(inner):
        raise ValueError(f"--{dotted}: {'.'.join(path)} is {shown(inner)}, which has no fields.")
    if OmegaConf.is_list(inner) and not (key.isdigit() and int(key) < len(inner)):
        raise ValueError(
            f"--{dotted}: the list has {len(inner)} entries, so {shown(key)} must be 0 to {len(inner) - 1}."
        )


def _load_merged(path: Path, above: tuple[Path, ...]) -> dict:
    if path in above:
        circle = " -> ".join(str(step) for step in (*above[above.index(path) :], path))
        raise ValueError(f"Recipes stand on each other in a circle: {circle}.")
    document = read_yaml(path)
    merged: dict = {}
    if document.get("base") is not None:
        merged = _load_merged(_find_named(document, "base", path, path.parent, FOLDER), (*above, path))
    # A base without a stage of its own may be shared by all; its names are checked against the widest stage.
    stage = document.get("stage") or merged.get("stage") or "variants"
    if stage not in STAGES:
        raise ValueError(f"{path}: {did_you_mean(str(stage), STAGES)}")
    if document.get("preset") is not None:
        preset = preset_settings(_find_named(document, "preset", path, FOLDER / "presets"), stage)
        below = stated_data(_find_named(document, "base", path, path.parent, FOLDER)) if document.get("base") else {}
        merged = merge(merge(merged, preset), {"data": below} if below else {})
    own = place_sections(document, stage, str(path))
    if document.get("stage") is not None:
        own["stage"] = document["stage"]
    return merge(merged, own)


def _find_named(document: dict, key: str, path: Path, *folders: Path) -> Path:
    """The file that a recipe names as its base or preset."""
    name = document[key]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path}: {key} must be the name or path of one, got {shown(name)}.")
    try:
        return find_recipe(name, *folders)
    except (ValueError, OSError) as error:  # names that no file can have, too
        raise ValueError(fit(f"{path}: {key}: {error}")) from None


def stated_data(path: Path) -> dict[str, Any]:
    """What the data sections of a recipe and its bases say, shipped ones left out."""
    document = read_yaml(path)
    has_base = document.get("base") is not None
    below = stated_data(_find_named(document, "base", path, path.parent, FOLDER)) if has_base else {}
    if path.is_relative_to(FOLDER.resolve()):
        return below
    own = place_sections(document, document.get("stage") or "variants", str(path))
    return merge(below, own.get("data", {}))


def find_recipe(name: str | Path, *folders: Path) -> Path:
    """A recipe file: a path, a path relative to one of the folders, or the bare name of a file there."""
    name = Path(name)
    candidates = [name if name.is_absolute() else Path.cwd() / name]
    candidates += [folder / name for folder in folders]
    candidates += [folder / f"{name}.yaml" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    shipped = sorted(path.stem for folder in folders for path in folder.glob("*.yaml") if path.stem != "base")
    raise ValueError(f"There is no recipe {shown(str(name), 80)}: {did_you_mean(name.stem, shipped)} A path works too.")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A wrong name and the closest right one, or the first right ones."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {fit(', '.join(choices[:12]), 120)}."
    return f"unknown name {shown(name)}; {hint}"

"""A family as LoRA adapters: one repository with the base, one small repository per m that refers to it by commit."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fusedvlm.files import read_json
from fusedvlm.hub_cards.card.lint_card import lint_card
from fusedvlm.hub_cards.card.render_card import card_template
from fusedvlm.hub_cards.facts import StatedFacts, find_stated, mean_scores
from fusedvlm.hub_cards.release.run_facts import read_content
from fusedvlm.model_source import require_folder

from .bundle import Content, is_local, weight_headers
from .release_files import CARD, CHECKSUMS, checksums
from .run_facts import RESULTS, content_size, read_results
from .variant_release import Release, build_release, check_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# AutoPeftModel imports what is named here; the class of the training process is not installed elsewhere.
AUTO_MAPPING = {"base_model_class": "AutoModelForImageTextToText", "parent_library": "transformers"}
UNKNOWN_COMMIT = "0" * 40  # stands for the base's commit as long as there is none


@dataclass(frozen=True)
class AdapterRelease:
    """One adapter as it is published; see `Release`."""

    repo_id: str
    tag: str
    num_visual_tokens: int
    files: dict[str, Content]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class AdapterFamily:
    """Everything but the base's commit, which is known when the base is pushed.

    Args:
        base: release of the base.
        folders: {m: folder of the adapter}, in the order of m.
        names: {m: repository}.
        scores: {m: mean score}, as far as measured.
    """

    base: Release
    folders: dict[int, Path]
    names: dict[int, str]
    tag: str
    stated: StatedFacts
    scores: dict[int, float] = field(default_factory=dict)

    def releases(self, commit: str) -> list[AdapterRelease]:
        """One release per adapter, pinned to a commit of the base.

        Raises:
            ValueError: naming what is wrong with an adapter.
        """
        return [self._release(m, folder, commit) for m, folder in self.folders.items()]

    def _release(self, m: int, folder: Path, commit: str) -> AdapterRelease:
        repo_id, config = self.names[m], read_adapter(folder)
        published = {
            **config,
            "base_model_name_or_path": self.base.repo_id,
            "revision": commit,
            "inference_mode": True,
            "auto_mapping": AUTO_MAPPING,
        }
        licenses = ("LICENSE", "NOTICE")
        files: dict[str, Content] = {
            name: content for name, content in self.base.files.items() if name.startswith(licenses)
        }
        files[CONFIG] = (json.dumps(published, indent=2, sort_keys=True) + "\n").encode()
        files[WEIGHTS] = folder / WEIGHTS
        files[CARD] = self._card(m, folder, published).encode()
        files[CHECKSUMS] = checksums(files)
        release = AdapterRelease(repo_id, self.tag, m, dict(sorted(files.items())))
        check_adapter(release)
        return release

    def _card(self, m: int, folder: Path, config: dict[str, Any]) -> str:
        shapes = weight_headers(folder)[WEIGHTS]
        metadata = ModelCardData(
            language=list(self.stated.languages) or None,
            license=self.stated.license,
            license_name=self.stated.license_name,
            license_link=self.stated.license_link,
            library_name="transformers",  # which loads both; the Hub's snippet for peft knows no such task
            pipeline_tag="image-text-to-text",
            base_model=[self.base.repo_id],
            base_model_relation="adapter",
            tags=["fusedvlm", f"fusedvlm-m{m}", "lora", "multimodal", "peft", "vision-language-model"],
        )
        family = [
            {"m": n, "repo_id": repo_id, "score": f"{self.scores[n]:.3g}" if n in self.scores else "not measured"}
            for n, repo_id in self.names.items()
        ]
        return card_template("adapter_card.md.jinja").render(
            metadata=metadata.to_yaml().rstrip(),
            name=self.names[m].partition("/")[2],
            repo_id=self.names[m],
            m=m,
            tag=self.tag,
            base=self.base.repo_id,
            commit=config["revision"],
            rank=config["r"],
            alpha=config["lora_alpha"],
            layers=adapted_layers(shapes),
            whole=", ".join(config.get("modules_to_save") or ()),
            parameters=f"{sum(math.prod(shape) for shape in shapes.values()):,}",
            size=f"{content_size(folder / WEIGHTS) / 1e6:.2f} MB",
            family=family,
            measured=bool(self.scores),
            license=self.stated.license,
        )


def adapted_layers(shapes: dict[str, list[int]]) -> str:
    """The parts of the model with adapted layers and how many each has, from the weights' names."""
    layers = {name.partition(".lora_A")[0] for name in shapes if ".lora_A" in name}
    parts: dict[str, int] = {}
    for layer in layers:
        match = re.search(r"(fuser|vision_tower|language_model|projector|merger)", layer)
        part = match.group(1) if match else "other"
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{count} in {part}" for part, count in sorted(parts.items()))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> dict[str, Any]:
    """Settings of an adapter.

    Raises:
        ValueError: when the folder is not an adapter in safetensors format, or is damaged.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: {CONFIG} does not describe a LoRA adapter.")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: {WEIGHTS} is missing; save the adapter in safetensors format.")
    if not any(".lora_" in name for name in weight_headers(folder).get(WEIGHTS, ())):
        raise ValueError(f"{folder}: {WEIGHTS} has no LoRA weights.")
    return config


def adapter_m(folder: Path) -> int:
    """m of an adapter: its processor's, else the number at the end of the folder's name.

    Raises:
        ValueError: when neither says it.
    """
    path = folder / "processor_config.json"
    if path.is_file():
        m = read_json(path).get("num_visual_tokens")
        if m is not None:
            return int(m)
    match = re.search(r"-m(\d+)$", folder.resolve().name)
    if match is None:
        raise ValueError(
            f"{folder} does not say its number of visual tokens: save the processor with it, or call it NAME-m8."
        )
    return int(match.group(1))


def find_adapters(path: Path) -> dict[int, Path]:
    """{m: folder} of an adapter or of a folder of adapters, in the order of m.

    Raises:
        ValueError: when there is none, or two have the same m.
    """
    path = Path(path)
    require_folder(path)
    folders = [path] if is_adapter(path) else sorted(entry for entry in path.iterdir() if is_adapter(entry))
    if not folders:
        raise ValueError(f"{path}: neither an adapter ({CONFIG}, {WEIGHTS}) nor a folder of adapters.")
    found: dict[int, Path] = {}
    for folder in folders:
        m = adapter_m(folder)
        if m in found:
            raise ValueError(f"{found[m]} and {folder} both have m={m}; a family has one adapter per m.")
        found[m] = folder
    return dict(sorted(found.items()))


def base_of(folders: dict[int, Path]) -> Path:
    """The one variant that all adapters belong to.

    Raises:
        ValueError: when they belong to several, or to one that is not a folder of this machine.
    """
    bases = {str(read_adapter(folder).get("base_model_name_or_path")) for folder in folders.values()}
    if len(bases) > 1:
        raise ValueError(
            f"The adapters belong to {len(bases)} bases ({', '.join(sorted(bases))}); push each family alone."
        )
    base = bases.pop()
    if not is_local(base):
        raise ValueError(
            f"The adapters belong to {base}, which is no folder here; download it and name it in {CONFIG}."
        )
    return Path(base)


def build_adapters(
    folder: Path, namespace: str, *, name: str | None, tag: str, stated: Path | None, **given: Any
) -> AdapterFamily:
    """The base's release and everything needed for the adapters'.

    Args:
        folder: an adapter, or a folder of adapters.
        namespace: user or organization.
        name: repositories are called name-base, name-m1-lora, ...; by default as the adapters' folders.
        tag: name of the release, the same for base and adapters: transformers looks for one revision in both.
        stated: YAML file of stated facts; facts.yaml beside the adapters or beside the base by default.
        given: licenses that override it.

    Raises:
        ValueError: for incomplete or mixed adapters, and as `build_release` for the base.
    """
    folders = find_adapters(folder)
    base = base_of(folders)
    first = next(iter(folders.values()))
    name = name or re.sub(r"-m\d+$", "", first.resolve().name)
    facts = find_stated(first, stated, **given)
    if facts.license is None:
        facts = find_stated(base, stated, **given)
    names = {m: f"{namespace}/{name}-m{m}-lora" for m in folders}
    for repo_id in names.values():
        check_names(repo_id, tag)
    release = build_release(base, f"{namespace}/{name}-base", tag=tag, stated=facts)
    family = AdapterFamily(release, folders, names, tag, facts, mean_scores(read_results(first, RESULTS)))
    family.releases(UNKNOWN_COMMIT)  # whatever is wrong with an adapter is said before the base is sent
    return family


def check_adapter(release: AdapterRelease) -> None:
    """Raise `ValueError` for a card that the Hub would refuse, or paths of this machine."""
    sizes = {path: content_size(content) for path, content in release.files.items()}
    card = read_content(release.files[CARD]).decode()
    problems = lint_card(card, sizes, release.repo_id)
    for key, value in json.loads(read_content(release.files[CONFIG])).items():
        if isinstance(value, str) and Path(value).is_absolute():
            problems.append(f"{CONFIG} names a folder of this machine as its {key}")
    if problems:
        raise ValueError(f"{release.repo_id}: {problems[0]}; nothing was sent.")

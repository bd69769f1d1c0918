"""Which weights answer at which m: a variant's folder, a family's folder, or a repository of the Hub."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from fusedvlm.files import read_json, sha256_of
from fusedvlm.model_source import require_source

# What decides answers, beside the weights.
DECISIVE = ("tokenizer.json", "chat_template.jinja", "query_tokenizer/tokenizer.json", "preprocessor_config.json")
# Fields of a configuration that do not: the m that is asked is stated with every question.
DIAL = (
    "num_visual_tokens",
    "num_followup_visual_tokens",
    "trained_num_visual_tokens",
    "transformers_version",
    "auto_map",
)


@dataclass(frozen=True)
class Variant:
    """Weights that answer.

    Args:
        source: folder or repository.
        num_visual_tokens: its own m.
        largest: the largest m that its weights were trained with.
        commit: of the repository, else a digest of the files that decide its answers.
    """

    source: str
    num_visual_tokens: int
    largest: int
    commit: str


def read_variant(folder: Path) -> Variant:
    """A variant's folder. Raises `ValueError` where its configuration is damaged or it has no weights."""
    config = read_json(folder / "config.json")
    m = config.get("num_visual_tokens")
    weights = sorted(folder.glob("*.safetensors"))
    if config.get("model_type") != "fusedvlm" or not isinstance(m, int) or not weights:
        raise ValueError(f"{folder}: not a FusedVLM variant with weights; name a variant's or a family's folder.")
    digest = hashlib.sha256(
        json.dumps({name: value for name, value in config.items() if name not in DIAL}, sort_keys=True).encode()
    )
    for path in [*weights, *(folder / name for name in DECISIVE if (folder / name).is_file())]:
        digest.update(f"{path.name} {sha256_of(path)}".encode())
    return Variant(str(folder), m, max(config.get("trained_num_visual_tokens") or [m]), digest.hexdigest()[:40])


def find_variants(model: str, revision: str | None = None) -> list[Variant]:
    """Every variant of a folder, ascending in m; one for a repository of the Hub.

    Raises:
        ValueError: when there is none.
    """
    require_source("MODEL", model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return [_hub_variant(model, revision)]
    if revision is not None:
        raise ValueError(f"--revision {revision}: {model} is a folder of this machine, which has no revisions.")
    if (folder / "config.json").is_file():
        return [read_variant(folder)]
    inner = [path.parent for path in sorted(folder.glob("*/config.json")) if _is_variant(path)]
    if not inner:
        raise ValueError(f"{model}: neither a variant (config.json) nor a family with a folder per variant.")
    return sorted((read_variant(path) for path in inner), key=lambda variant: variant.num_visual_tokens)


def _is_variant(path: Path) -> bool:
    is_ours = read_json(path).get("model_type") == "fusedvlm"
    return is_ours and (path.parent / "processor_config.json").is_file()


def _hub_variant(repo: str, revision: str | None) -> Variant:
    try:
        path = cached_file(repo, "config.json", revision=revision)
    except OSError as error:
        raise ValueError(f"{repo}: {' '.join(str(error).split())[:240]}") from error
    config = read_json(str(path))
    m = config.get("num_visual_tokens")
    if config.get("model_type") != "fusedvlm" or not isinstance(m, int):
        raise ValueError(f"{repo}: not a FusedVLM variant (config.json has another model_type).")
    commit = Path(str(path)).parent.name  # the cache keeps every file below its commit
    return Variant(repo, m, max(config.get("trained_num_visual_tokens") or [m]), commit)


def share_counts(variants: Sequence[Variant], counts: Sequence[int] | None) -> list[tuple[Variant, list[int]]]:
    """Which variant answers at which m: one with the longest dial for all, where all have the same weights.

    Args:
        variants: of a family.
        counts: wanted m; by default each variant's own.

    Raises:
        ValueError: for an m twice or out of range, or one that a family of different weights has no variant for.
    """
    wanted = sorted({variant.num_visual_tokens for variant in variants}) if counts is None else list(counts)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--m {','.join(map(str, wanted))}: an m is there twice.")
    if min(wanted) < 1:
        raise ValueError(f"--m {min(wanted)}: the number of visual tokens is 1 or more.")
    if len({variant.commit for variant in variants}) == 1:
        return [(max(variants, key=lambda variant: (variant.largest, variant.num_visual_tokens)), wanted)]
    by_m = {variant.num_visual_tokens: variant for variant in variants}
    if lacking := [m for m in wanted if m not in by_m]:
        raise ValueError(
            f"--m {lacking[0]}: the variants of this family have different weights, with m = "
            f"{', '.join(map(str, by_m))}; name one variant's folder to ask it at another m."
        )
    return [(by_m[m], [m]) for m in wanted]

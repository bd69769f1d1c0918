"""Everything one variant's repository holds, built on this machine and complete before anything is sent."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

import fusedvlm
from fusedvlm.hub_cards.facts import CardFacts, Common, Neighbor, StatedFacts, find_stated
from fusedvlm.hub_cards.licenses import license_texts
from fusedvlm.model_source import require_folder

from .bundle import Content, Files, bundle
from .release_files import CHECKSUMS, card_files, checksums, evidence_files
from .run_facts import (
    CONTROL,
    PICTURE,
    RESULTS,
    content_hash,
    count_facts,
    read_config,
    read_example,
    read_results,
    read_run,
    weights_digest,
)

TAG = "v1.0"
NOTHING_COMMON = Common()
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
TAG_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


@dataclass(frozen=True)
class Release:
    """One variant as it is published.

    Args:
        repo_id: user/name on the Hub.
        tag: name of the release.
        num_visual_tokens: m.
        files: path in the repository -> file here, or bytes. The same inputs give the same bytes.
        facts: what the card says.
        notes: what was changed or left at home, one line each.
    """

    repo_id: str
    tag: str
    num_visual_tokens: int
    files: Mapping[str, Content]
    facts: CardFacts
    notes: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write the repository's files into a folder."""
        for name, content in self.files.items():
            write_file(folder / name, content)


def check_target(folder: Path, mark: str) -> None:
    """Raise `ValueError` when a folder holds a README.md that is somebody else's, which writing would replace."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder.")
    if (folder / "README.md").exists() and not (folder / mark).exists():
        raise ValueError(f"{folder / 'README.md'} was not written by this command (no {mark} beside it); move it away.")


def write_file(path: Path, content: Content) -> None:
    """Write one file atomically; a file that is already there as itself stays."""
    if isinstance(content, Path) and path.exists() and path.samefile(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if isinstance(content, bytes):
        partial.write_bytes(content)
    else:
        shutil.copyfile(content, partial)
    partial.replace(path)


def find_variants(path: Path) -> list[Path]:
    """A variant's folder, or the variants in a family's folder in the order of m.

    Raises:
        ValueError: when there is none, or two have the same m.
    """
    path = Path(path)
    require_folder(path)
    if _variant_m(path) is not None:
        return [path]
    found: dict[int, Path] = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.suffix != ".partial"):
        m = _variant_m(folder)
        if m in found:
            raise ValueError(f"{found[m]} and {folder} both have m={m}; a family has one variant per m.")
        if m is not None:
            found[m] = folder
    if not found:
        raise ValueError(f"{path}: neither a variant (config.json, processor_config.json) nor a folder of variants.")
    return [found[m] for m in sorted(found)]


def _variant_m(folder: Path) -> int | None:
    """m of a variant that answers; None for other folders (checkpoints of stage 1, language models)."""
    if not (folder / "config.json").is_file():
        return None
    try:
        config = read_config(folder, folder / "config.json")
    except ValueError:
        if (folder / "processor_config.json").is_file() and (folder / "query_tokenizer").is_dir():
            raise  # a variant by its other files, so its damage matters
        return None
    answers = "FusedVLMForConditionalGeneration" in (config.get("architectures") or [])
    return config.get("num_visual_tokens") if answers else None


def build_release(
    variant: Path,
    repo_id: str,
    *,
    tag: str = TAG,
    family: Sequence[Neighbor] = (),
    stated: StatedFacts,
    common: Common = NOTHING_COMMON,
) -> Release:
    """All files of a variant's repository, card included.

    Args:
        variant: a saved variant; results.json, swapped.json and run.json are read in it or beside it.
        repo_id: user/name.
        tag: release that the card's snippets pin.
        family: all variants to be linked, this one included; only itself when empty.
        stated: what a user says about it; the license is a must.
        common: what the family's repositories share.

    Raises:
        ValueError: for an incomplete variant, a license or its text that is missing, damaged results; with the fix.
    """
    variant = Path(variant)
    check_names(repo_id, tag)
    files, notes = bundle(variant)
    facts = gather_facts(variant, files, repo_id, tag=tag, family=family, stated=stated, common=common)
    shown = read_example(variant)
    licenses = license_texts(stated, facts.counted)
    hashes = {**facts.counted.sha256, **{name: content_hash(text) for name, text in licenses.items()}}
    counted = replace(facts.counted, sha256=dict(sorted(hashes.items())))
    facts = replace(facts, counted=counted, stated=replace(stated, license_files=tuple(sorted(licenses))))
    evidence = evidence_files(facts)
    if shown is not None:
        facts, evidence[PICTURE] = replace(facts, example=shown[0]), shown[1]
    facts = replace(facts, files=tuple(sorted({*licenses, *evidence})))
    files |= {**licenses, **evidence, **card_files(facts)}
    files[CHECKSUMS] = checksums(files)
    return Release(repo_id, tag, facts.m, dict(sorted(files.items())), facts, tuple(notes))


def draft(
    variant: Path,
    repo_id: str,
    *,
    tag: str = TAG,
    family: Sequence[Neighbor] = (),
    stated: StatedFacts,
    common: Common = NOTHING_COMMON,
) -> Files:
    """The card, facts, plots and results of a variant that may not be ready to be published; what is missing shows.

    Raises:
        ValueError: for a variant or results that are damaged.
    """
    variant = Path(variant)
    check_names(repo_id, tag)
    files: Files = {path.name: path for path in (variant / "config.json", *sorted(variant.glob("*.safetensors")))}
    stated = replace(stated, license_files=())  # a draft has none of them
    facts = gather_facts(variant, files, repo_id, tag=tag, family=family, stated=stated, common=common)
    evidence = evidence_files(facts)
    facts = replace(facts, files=tuple(sorted(evidence)), complete=False)
    return {**evidence, **card_files(facts)}


def gather_facts(
    variant: Path,
    files: Files,
    repo_id: str,
    *,
    tag: str = TAG,
    family: Sequence[Neighbor] = (),
    stated: StatedFacts,
    common: Common = NOTHING_COMMON,
) -> CardFacts:
    """Facts of a variant from its files, the results beside it and what was stated.

    Raises:
        ValueError: when files are damaged, the family lacks this variant, or a stated benchmark was not measured.
    """
    counted = count_facts(variant, files, stated)
    m = counted.num_visual_tokens
    family = tuple(sorted(family, key=lambda neighbor: neighbor.num_visual_tokens)) or (Neighbor(m, repo_id),)
    if Neighbor(m, repo_id) not in family and repo_id != common.dial:
        raise ValueError(f"{variant} has m={m} and goes to {repo_id}, but the family given does not say so.")
    measured = read_results(variant, RESULTS)
    tasks = {score.task for score in measured.scores} if measured else set()
    if unknown := sorted(set(stated.benchmarks) - tasks):
        raise ValueError(f"Benchmark {unknown[0]!r} is stated, but {RESULTS} has only {sorted(tasks)}.")
    return CardFacts(
        repo_id=repo_id,
        tag=tag,
        stated=stated,
        counted=counted,
        measured=measured,
        control=read_results(variant, CONTROL),
        training=read_run(variant),
        family=family,
        package_version=fusedvlm.__version__,
        common=common,
    )


def build_family(
    folder: Path,
    namespace: str,
    *,
    name: str | None = None,
    tag: str = TAG,
    stated: Path | None = None,
    license: str | None = None,
    llm_license: str | None = None,
    license_files: Sequence[Path] = (),
    dial: bool = False,
) -> list[Release]:
    """One release per variant, in the order of m, linked with each other; nothing is sent.

    Args:
        folder: a family's folder, or one variant.
        namespace: user or organization.
        name: repositories are called name-m1, name-m2, ...; the variants' own common name by default.
        tag: name of the release.
        stated: YAML file of stated facts; facts.yaml beside or in each variant by default.
        license, llm_license, license_files: override what that file says.
        dial: whether to add one repository called name, in front, with the weights that all of them share.

    Raises:
        ValueError: as `build_release`, and when a dial is asked for and the weights are not the same.
    """
    given = {"license": license, "llm_license": llm_license, "license_files": tuple(map(str, license_files))}
    members = name_family(folder, namespace, name)
    common = Common(shared_weights([variant for variant, _, _ in members]))
    if dial:
        common, members = add_dial(members, common)
    return [
        build_release(
            variant, repo_id, tag=tag, family=family, stated=find_stated(variant, stated, **given), common=common
        )
        for variant, repo_id, family in members
    ]


def shared_weights(variants: Sequence[Path]) -> str | None:
    """Digest of the weights when several variants hold the same, else None."""
    digests = {weights_digest({path.name: path for path in variant.glob("*.safetensors")}) for variant in variants}
    return digests.pop() if len(variants) > 1 and len(digests) == 1 else None


Member = tuple[Path, str, tuple[Neighbor, ...]]


def add_dial(members: list[Member], common: Common) -> tuple[Common, list[Member]]:
    """A family with one repository more, for every m: that of the largest m without it in its name.

    Raises:
        ValueError: when the variants do not hold the same weights.
    """
    if common.weights is None:
        raise ValueError(
            "One repository with the dial needs a family whose variants hold the same weights, as elastic training "
            f"leaves them; these {len(members)} do not. Push them without --dial."
        )
    variant, repo_id, family = members[-1]
    repo_id = repo_id.removesuffix(f"-m{family[-1].num_visual_tokens}")
    return replace(common, dial=repo_id), [(variant, repo_id, family), *members]


def name_family(folder: Path, namespace: str, name: str | None = None) -> list[tuple[Path, str, tuple[Neighbor, ...]]]:
    """(variant, its repository, all of the family) in the order of m."""
    variants = find_variants(folder)
    counts = [m for m in map(_variant_m, variants) if m is not None]  # `find_variants` lists no others
    name = name or _common_name(variants, counts)
    family = tuple(Neighbor(m, f"{namespace}/{name}-m{m}") for m in counts)
    return [(variant, neighbor.repo_id, family) for variant, neighbor in zip(variants, family, strict=True)]


def _common_name(variants: list[Path], counts: list[int]) -> str:
    """`fusedvlm` for fusedvlm-m1, fusedvlm-m2, ...; else the folder's own name."""
    folders = [variant.resolve() for variant in variants]
    names = {folder.name.removesuffix(f"-m{m}") for folder, m in zip(folders, counts, strict=True)}
    if len(names) == 1 and "" not in names:
        return names.pop()
    return folders[0].parent.name


def check_names(repo_id: str, tag: str) -> None:
    """Raise `ValueError` for a repository id or tag that the Hub would refuse."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a repository: {str(error).splitlines()[0]}") from error
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is not a repository id like user/name.")
    if not TAG_NAME.fullmatch(tag) or ".." in tag or tag.endswith((".", ".lock")):
        raise ValueError(f"{tag!r} cannot be a tag; use one like v1.0.")

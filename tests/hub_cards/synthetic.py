"""Releases without models: a few files of the kinds that matter to a push, and what must always hold on the Hub."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from fusedvlm.hub_double.hub_store import Repo
from fusedvlm.tests.hub_cards.faulty_hub import FaultyHub

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 576)


@dataclass
class Synthetic:
    """What `push` needs of a release."""

    repo_id: str
    tag: str
    num_visual_tokens: int
    files: dict[str, Path | bytes]


def release(m: int, folder: Path, *, seed: int = 0, tag: str = "v1.0", user: str = "ada", **extra: bytes) -> Synthetic:
    """A release of one variant; the weights are a file, the rest is bytes. `extra` adds or replaces files."""
    generator = random.Random(f"{seed}/{m}")
    weights = folder / f"m{m}-{seed}.safetensors"
    weights.write_bytes(generator.randbytes(generator.choice([3_000, 60_000, 120_000])))
    repo_id = f"{user}/tiny-m{m}"
    files: dict[str, Path | bytes] = {
        "README.md": f"---\nlicense: mit\n---\n# m = {m}, {repo_id} {tag}\n".encode() + b"text\n" * (10 + seed),
        "config.json": json.dumps({"num_visual_tokens": m, "seed": seed}).encode(),
        "model.safetensors": weights,
        "plots/score.png": generator.randbytes(400),
        "query_tokenizer/vocab.json": b"{}",
        **{name.replace("_", "."): data for name, data in extra.items()},
    }
    sums = {name: hashlib.sha256(content_of(content)).hexdigest() for name, content in files.items()}
    files["checksums.json"] = json.dumps({"algorithm": "sha256", "files": sums}, indent=2).encode()
    return Synthetic(repo_id, tag, m, files)


def family(folder: Path, counts=COUNTS, **options) -> list[Synthetic]:
    """Ten releases."""
    folder.mkdir(parents=True, exist_ok=True)
    return [release(m, folder, **options) for m in counts]


def content_of(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def tree(repo: Repo, oid: str) -> dict[str, str]:
    """{path: sha256} of a commit, without the file that the Hub itself puts there."""
    files = repo.commits[oid].files
    return {
        path: blob.sha256 or hashlib.sha256(blob.data).hexdigest()
        for path, blob in files.items()
        if path != ".gitattributes"
    }


def wanted(release: Synthetic) -> dict[str, str]:
    """{path: sha256} as it should be."""
    return {path: hashlib.sha256(content_of(content)).hexdigest() for path, content in release.files.items()}


def broken_promises(server: FaultyHub, releases: list[Synthetic], tokens: list[str]) -> list[str]:
    """What must hold at any moment, whatever was interrupted; empty when it does.

    No commit but the Hub's own first one is anything but the whole content, none came twice, no tag is on another
    commit, nobody could ever see a repository that was not complete, and no token went to the file storage.
    """
    problems = []
    for release in releases:
        repo = server.store.repos.get(release.repo_id)
        if repo is None:
            continue
        expected = wanted(release)
        trees = [tree(repo, oid) for oid in repo.commits]
        if any(found not in ({}, expected) for found in trees):
            problems.append(f"{repo.id}: half a commit")
        if trees.count(expected) > 1:
            problems.append(f"{repo.id}: {trees.count(expected)} commits of the same content")
        problems += [f"{repo.id}: tag on {oid}" for oid in repo.tags.values() if tree(repo, oid) != expected]
        seen = [oid for _, private, oid in repo.history if not private]
        problems += [f"{repo.id}: public at {oid}" for oid in seen if tree(repo, oid) != expected]
        if seen and any(not complete(server, other) for other in releases):
            problems.append(f"{repo.id}: public before the whole family was complete")
    for token in tokens:
        problems += [
            "token at the file storage" for seen in server.headers_seen if "Host: localhost" in seen and token in seen
        ]
    return problems


def complete(server: FaultyHub, release: Synthetic) -> bool:
    """Whether a release is on the Hub, tagged."""
    repo = server.store.repos.get(release.repo_id)
    return (
        repo is not None
        and release.tag in repo.tags
        and tree(repo, repo.tags[release.tag]) == wanted(release) == tree(repo, repo.head.oid)
    )

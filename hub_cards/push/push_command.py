"""What `fusedvlm push` does between its options and its output."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusedvlm.console import emit_json, say, show
from fusedvlm.hub_cards.check.repository_check import check_files
from fusedvlm.hub_cards.facts import find_stated, mean_scores
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.release.adapter_release import build_adapters
from fusedvlm.hub_cards.release.variant_release import Release, build_family, build_release, find_variants, name_family

from .collection import collect
from .push_adapters import plan_adapters, push_adapters
from .push_repository import Pushed, plan, push


@dataclass(frozen=True)
class PushPlan:
    """Something to push, complete and checked.

    Args:
        plan: (hub, overwrite=) -> what would be done, and why it could not be compared.
        push: (hub, public=, overwrite=, create_pr=) -> what was done.
        notes: {repository: line in the collection}, in its order.
        title: of the collection; None for a single variant.
    """

    plan: Callable[..., tuple[list[Pushed], str | None]]
    push: Callable[..., list[Pushed]]
    notes: Mapping[str, str]
    title: str | None


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """What a command line asks for; see `fusedvlm push --help`. `stated` overrides the facts file."""

    folder: Path
    all_variants: bool
    namespace: str | None
    repo: str | None
    name: str | None
    tag: str
    facts: Path | None
    stated: Mapping[str, Any]
    dial: bool = False
    collection: str | None = None
    no_collection: bool = False

    def options(self) -> dict[str, Any]:
        """What builds a family, of variants or adapters."""
        return {"name": self.name, "tag": self.tag, "stated": self.facts, **self.stated}


def plan_variants_push(request: PushRequest) -> PushPlan:
    """The variants that were asked for.

    Raises:
        ValueError: for options that contradict each other or the folder, and as `build_family`.
    """
    if (request.namespace is None) == (request.repo is None):
        raise ValueError("Give exactly one of --namespace USER and --repo USER/NAME.")
    variants = find_variants(request.folder)
    if len(variants) > 1 and not request.all_variants:
        raise ValueError(
            f"{request.folder} holds {len(variants)} variants; give --all, or one of them like {variants[0]}."
        )
    if request.repo is None:
        namespace = str(request.namespace)
        ids = [repo_id for _, repo_id, _ in name_family(request.folder, namespace, request.name)]
        title = None if request.no_collection else request.collection or title_of(ids)
        options = {**request.options(), "dial": request.dial}
        releases = build_family(request.folder, namespace, **options)
    elif len(variants) > 1 or request.name is not None or request.dial:
        raise ValueError("--repo names one repository; use --namespace (and --name, --dial) for several.")
    else:
        own = find_stated(variants[0], request.facts, **request.stated)
        releases = [build_release(variants[0], request.repo, tag=request.tag, stated=own)]
        title = request.collection
    lint(releases)
    notes = {release.repo_id: note(release) for release in releases}
    return PushPlan(partial(plan, releases), partial(push, releases), notes, title)


def plan_adapters_push(request: PushRequest) -> PushPlan:
    """Adapters and the base they share.

    Raises:
        ValueError: for options that make no sense for adapters, and as `build_adapters`.
    """
    if request.namespace is None or request.repo is not None:
        raise ValueError("Adapters and their base are several repositories: give --namespace (and --name), not --repo.")
    family = build_adapters(request.folder, request.namespace, **request.options())
    if len(family.folders) > 1 and not request.all_variants:
        raise ValueError(f"{request.folder} holds {len(family.folders)} adapters; give --all, or one of their folders.")
    lint([family.base])
    notes = {family.base.repo_id: "The base of the adapters"}
    for m, repo_id in family.names.items():
        mean = f", mean score {family.scores[m]:.3g}" if m in family.scores else ""
        notes[repo_id] = f"m = {m}: LoRA adapter{mean}"
    title = None if request.no_collection else request.collection or title_of(list(family.names.values()))
    return PushPlan(partial(plan_adapters, family), partial(push_adapters, family), notes, title)


def lint(releases: Sequence[Release]) -> None:
    """Refuse releases that `fusedvlm check` would find fault with.

    Raises:
        ValueError: with the first problem; the others are said before.
    """
    found = [(release.repo_id, p) for release in releases for p in check_files(release.files, release.repo_id)]
    for repo_id, problem in found:
        if problem.foreign_code:  # the publisher's own, a connector for example; readers will be told
            say(f"{repo_id}: {problem}")
    problems = [f"{repo_id}: {problem}" for repo_id, problem in found if not problem.foreign_code]
    for line in problems[1:]:
        say(line)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}; nothing was sent.")
    for release in releases:
        for note in release.notes:
            say(f"{release.repo_id}: {note}")


def title_of(repo_ids: Sequence[str]) -> str | None:
    """Title of a family's collection, the same when the family grows; None for a single variant."""
    if len(repo_ids) < 2:
        return None
    return re.sub(r"-m\d+", "", repo_ids[0].partition("/")[2])[:52] + ", every m"


def note(release: Release) -> str:
    """A repository's line in the collection: m, and the mean score if there is one."""
    if release.facts.is_dial:
        return f"Every m from 1 to {max(release.facts.counted.trained_num_visual_tokens)}, by the dial"
    mean = mean_scores(release.facts.measured).get(release.num_visual_tokens)
    return f"m = {release.num_visual_tokens}" + ("" if mean is None else f": mean score {mean:.3g}")


def group(hub: Hub, title: str | None, notes: Mapping[str, str], rows: Sequence[Pushed]) -> str | None:
    """Put the repositories into a collection, public when all of them are; returns its address."""
    if title is None:
        return None
    return collect(hub, title, rows[0].repo_id.partition("/")[0], notes, private=any(row.private for row in rows))


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")


def show_plan(rows: Sequence[Pushed], reason: str | None, title: str | None, as_json: bool) -> None:
    """Print what a push would do, file by file."""
    if reason:
        say(f"Could not compare with the Hub: {reason}")
    if as_json:
        emit_json({"dry_run": True, "compared": reason is None, "repositories": records(rows), "collection": title})
        return
    for row in rows:
        what = "not compared" if row.difference is None else "up to date" if not row.difference else str(row.difference)
        show(f"{row.repo_id} (m = {row.num_visual_tokens}, tag {row.tag}): {what}, {size(row.sent_bytes)} to send")
        marks = {} if row.difference is None else marked(row)
        for path, count in sorted(row.sizes.items()):
            if marks.get(path) != "=":
                show(f"  {marks.get(path, '?')} {path}  {size(count)}")
        for path in row.difference.delete if row.difference else ():
            show(f"  - {path}")
        if row.difference and row.difference.keep:
            show(f"  = {len(row.difference.keep)} unchanged")
    if title:
        show(f"Collection: {title}")
    show(f"{len(rows)} repositories, {size(sum(row.sent_bytes for row in rows))} to send; nothing was sent.")


def marked(row: Pushed) -> dict[str, str]:
    """{path: + new, ~ changed, = unchanged}."""
    if row.difference is None:
        return {}
    signs = {"+": row.difference.add, "~": row.difference.change, "=": row.difference.keep}
    return {path: sign for sign, paths in signs.items() for path in paths}


def show_done(rows: Sequence[Pushed], collection: str | None, as_json: bool) -> None:
    """Print where everything is."""
    if as_json:
        emit_json({"dry_run": False, "repositories": records(rows), "collection": collection})
        return
    for row in rows:
        where = row.pull_request or row.url
        seen = "proposed" if row.pull_request else "private" if row.private else "public"
        at = f"{row.tag} at {row.commit[:8]}" if row.commit else row.tag
        show(f"{where}  m = {row.num_visual_tokens}, {seen}, {at}: {row.difference}")
    if collection:
        show(f"{collection}")


def records(rows: Sequence[Pushed]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [{**asdict(row), "sizes": dict(row.sizes), "sent_bytes": row.sent_bytes} for row in rows]

"""`fusedvlm push`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .hub import Hub
    from .push import Pushed
    from .release import Release


def push(
    folder: Annotated[Path, typer.Argument(help="A variant's folder, or a family's with one folder per variant.")],
    all_variants: Annotated[bool, typer.Option("--all", help="Push every variant of the family.")] = False,
    namespace: Annotated[
        str | None, typer.Option(help="User or organisation; repositories are called NAMESPACE/NAME-mM.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="NAME in that; what the variants' folders have in common by default.")
    ] = None,
    repo: Annotated[str | None, typer.Option(help="user/name of the repository, for a single variant.")] = None,
    tag: Annotated[str, typer.Option(help="Name of the release. A tag that exists is never moved.")] = "v1.0",
    public: Annotated[
        bool, typer.Option("--public", help="Make the repositories public once every one is verified.")
    ] = False,
    collection: Annotated[
        str | None, typer.Option(help="Title of the family's collection; made from its name by default.")
    ] = None,
    no_collection: Annotated[bool, typer.Option("--no-collection", help="Make no collection.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights, as the Hub spells it. There is no default.")
    ] = None,
    llm_license: Annotated[str | None, typer.Option(help="Licence of the language model.")] = None,
    license_file: Annotated[
        list[Path] | None, typer.Option(help="Licence text that must travel along; may be repeated.")
    ] = None,
    facts: Annotated[
        Path | None, typer.Option(help="Stated facts (YAML); facts.yaml beside the variants by default.")
    ] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="The folders hold LoRA adapters: push their base once, then each.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose as pull requests, where the token may not write.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that somebody else wrote into a repository.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent and send nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Put variants on the Hub: one repository per m, one commit each, tagged, private until all are verified.

    Everything is built and checked here before anything is sent. Running the same command again resumes an interrupted
    run; repositories that are right already get no commit. The token is the one of `hf auth login` or HF_TOKEN.

    \b
    Examples:
      fusedvlm push runs/quickstart --all --namespace ada --license apache-2.0 --dry-run
      fusedvlm push runs/quickstart --all --namespace ada --license apache-2.0 --public
      fusedvlm push runs/quickstart/fusedvlm-m32 --repo ada/fusedvlm-m32 --facts facts.yaml --tag v1.1
    """
    from .collection import check_title
    from .hub import Hub, Patience
    from .push import plan
    from .push import push as push_all

    if create_pr and (public or collection):
        raise ValueError("--create-pr only proposes content; leave out --public and --collection.")
    stated = {"license": license, "llm_license": llm_license, "license_files": tuple(map(str, license_file or ()))}
    releases = build(folder, all_variants, namespace, name, repo, tag, facts, stated)
    lint(releases)
    title = None if no_collection or create_pr else collection or default_title(releases)
    if title:
        check_title(title)
    hub = Hub(patience=Patience(attempts=2) if dry_run else None)
    if dry_run:
        rows, reason = plan(releases, hub, overwrite=overwrite)
        show_plan(rows, reason, title, json_output)
        return
    rows = push_all(releases, hub, public=public, overwrite=overwrite, create_pr=create_pr)
    address = group(hub, title, releases, private=not all_public(rows)) if title else None
    show_done(rows, address, json_output)


def build(
    folder: Path,
    all_variants: bool,
    namespace: str | None,
    name: str | None,
    repo: str | None,
    tag: str,
    facts: Path | None,
    stated: dict[str, Any],
) -> "list[Release]":
    """The releases that were asked for.

    Raises:
        ValueError: for options that contradict each other or the folder, and as `build_family`.
    """
    from .facts import find_stated
    from .release import build_family, build_release, find_variants

    if (namespace is None) == (repo is None):
        raise ValueError("Give exactly one of --namespace USER and --repo USER/NAME.")
    variants = find_variants(folder)
    if len(variants) > 1 and not all_variants:
        raise ValueError(
            f"{folder} holds {len(variants)} variants; give --all, or one of the folders like {variants[0]}."
        )
    if repo is None:
        return build_family(folder, namespace, name=name, tag=tag, stated=facts, **stated)
    if len(variants) > 1 or name is not None:
        raise ValueError("--repo names one repository; use --namespace (and --name) for several variants.")
    return [build_release(variants[0], repo, tag=tag, stated=find_stated(variants[0], facts, **stated))]


def lint(releases: "Sequence[Release]") -> None:
    """Refuse releases that `fusedvlm check` would find fault with.

    Raises:
        ValueError: with the first problem; the others are said before.
    """
    from fusedvlm.console import say

    from .check import check_files

    problems = [f"{release.repo_id}: {p}" for release in releases for p in check_files(release.files, release.repo_id)]
    for problem in problems[1:]:
        say(problem)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}; nothing was sent.")
    for release in releases:
        for note in release.notes:
            say(f"{release.repo_id}: {note}")


def default_title(releases: "Sequence[Release]") -> str | None:
    """Title of a family's collection, the same when the family grows; None for a single variant."""
    if len(releases) < 2:
        return None
    first = releases[0]
    return f"{first.repo_id.partition('/')[2].removesuffix(f'-m{first.num_visual_tokens}')[:52]}, every m"


def note(release: "Release") -> str:
    """A repository's line in the collection: m, and the mean score if there is one."""
    from .facts import mean_scores

    mean = mean_scores(release.facts.measured).get(release.num_visual_tokens)
    return f"m = {release.num_visual_tokens}" + ("" if mean is None else f": mean score {mean:.1f}")


def group(hub: "Hub", title: str, releases: "Sequence[Release]", private: bool) -> str:
    """Put the repositories into a collection; returns its address."""
    from .collection import collect

    return collect(
        hub, title, releases[0].repo_id.partition("/")[0], {r.repo_id: note(r) for r in releases}, private=private
    )


def all_public(rows: "Sequence[Pushed]") -> bool:
    """Whether everybody can see every repository."""
    return not any(row.private for row in rows)


def size(count: int) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")


def show_plan(rows: "Sequence[Pushed]", reason: str | None, title: str | None, as_json: bool) -> None:
    """Print what a push would do, file by file."""
    from fusedvlm.console import emit_json, say, show

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


def marked(row: "Pushed") -> dict[str, str]:
    """{path: + new, ~ changed, = unchanged}."""
    signs = {"+": row.difference.add, "~": row.difference.change, "=": row.difference.keep}
    return {path: sign for sign, paths in signs.items() for path in paths}


def show_done(rows: "Sequence[Pushed]", collection: str | None, as_json: bool) -> None:
    """Print where everything is."""
    from fusedvlm.console import emit_json, show

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


def records(rows: "Sequence[Pushed]") -> list[dict[str, Any]]:
    """The rows as plain data."""
    from dataclasses import asdict

    return [{**asdict(row), "sizes": dict(row.sizes), "sent_bytes": row.sent_bytes} for row in rows]

"""`fusedvlm push`."""

from pathlib import Path
from typing import Annotated

import typer

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.model_source import require_folder
from fusedvlm.retry import RetryPolicy

from .collection import check_title


def push(
    folder: Annotated[Path, typer.Argument(help="A variant's folder, or a family's with one folder per variant.")],
    all_variants: Annotated[bool, typer.Option("--all", help="Push every variant of the family.")] = False,
    namespace: Annotated[
        str | None, typer.Option(help="User or organization; repositories are called NAMESPACE/NAME-mM.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="NAME in that; what the variants' folders have in common by default.")
    ] = None,
    repo: Annotated[str | None, typer.Option(help="user/name of the repository, for a single variant.")] = None,
    dial: Annotated[
        bool,
        typer.Option("--dial", help="Add one repository NAME for every m; for families that share their weights."),
    ] = False,
    tag: Annotated[
        str | None, typer.Option(help="Name of the release, v1.0 by default. A tag that exists is never moved.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the repositories public once every one is verified.")
    ] = False,
    collection: Annotated[
        str | None, typer.Option(help="Title of the family's collection; made from its name by default.")
    ] = None,
    no_collection: Annotated[bool, typer.Option("--no-collection", help="Make no collection.")] = False,
    license: Annotated[
        str | None, typer.Option(help="License of the weights, as the Hub spells it. There is no default.")
    ] = None,
    llm_license: Annotated[str | None, typer.Option(help="License of the language model.")] = None,
    license_file: Annotated[
        list[Path] | None, typer.Option(help="License text that must travel along; may be repeated.")
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
    require_folder(folder)
    from .push_command import PushRequest, group, plan_adapters_push, plan_variants_push, show_done, show_plan

    if create_pr and (public or collection or adapters):
        raise ValueError("--create-pr only proposes content; leave out --public, --collection and --adapters.")
    if create_pr and tag is not None:
        raise ValueError("--create-pr proposes content for the main branch, which its card pins; leave out --tag.")
    stated = {"license": license, "llm_license": llm_license, "license_files": tuple(map(str, license_file or ()))}
    request = PushRequest(
        folder=folder,
        all_variants=all_variants,
        namespace=namespace,
        repo=repo,
        name=name,
        tag=tag or ("main" if create_pr else "v1.0"),
        facts=facts,
        stated=stated,
        dial=dial,
        collection=collection,
        no_collection=no_collection or create_pr,
    )
    planned = plan_adapters_push(request) if adapters else plan_variants_push(request)
    if planned.title is not None:
        check_title(planned.title)
    hub = Hub(retry_policy=RetryPolicy(attempts=2) if dry_run else None)
    if dry_run:
        show_plan(*planned.plan(hub, overwrite=overwrite), planned.title, json_output)
        return
    rows = planned.push(hub, public=public, overwrite=overwrite, create_pr=create_pr)
    show_done(rows, group(hub, planned.title, planned.notes, rows), json_output)

"""`fusedvlm check`, `fusedvlm card` and `fusedvlm space`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedvlm.console import emit_json, say, show
from fusedvlm.model_source import require_folder, require_folder_or_repository

Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of the repository.")]
Facts = Annotated[
    Path | None,
    typer.Option("--facts", help="YAML file of stated facts; facts.yaml beside or in the variant by default."),
]
License = Annotated[str | None, typer.Option(help="License of the weights, as the Hub spells it. No default.")]
LlmLicense = Annotated[str | None, typer.Option(help="License of the language model.")]
LicenseFile = Annotated[
    list[Path] | None,
    typer.Option("--license-file", help="License text that must travel along; repeat it, the agreement itself first."),
]
Namespace = Annotated[str, typer.Option(help="User or organization that the repositories will belong to.")]
Name = Annotated[
    str | None, typer.Option(help="Repositories are called NAME-m1, NAME-m2, ...; from the folders if left out.")
]
Tag = Annotated[str, typer.Option(help="Release that the card's snippets pin.")]


def check(
    target: Annotated[
        str, typer.Argument(help="Folder of a variant or of a family, or Hub repository.", metavar="DIR|REPO")
    ],
    revision: Revision = None,
    load: Annotated[
        bool, typer.Option(help="Load the model and ask it, in a process without network, secrets and home.")
    ] = True,
    run_foreign_code: Annotated[
        bool, typer.Option("--run-foreign-code", help="Load it even if its code is none of this package's.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Verify that a folder or repository is a complete and sound variant.

    Complete; every file as checksums.json says; code exactly what this or a released version writes; every reference to
    code and every link resolved; no pickle, secret, path or link out; backbones pinned to commits; token ids and finite
    weights; licenses; card and plots equal to facts.json, facts to the files and results. Then it is loaded and asked
    in a process that cannot import this package and has nothing to steal. Foreign code is shown as a diff and not run.
    One line per problem; exit code 1 when there are any, 2 when there is nothing to check.

    Example: fusedvlm check runs/published/fusedvlm-m8
    """
    require_folder_or_repository(target)
    from fusedvlm.hub_cards.check.check_all import verify

    say(f"Checking {target}{', then loading it and asking once' if load else ''}: this takes a while.")
    reports = verify(target, revision, load, run_foreign_code)
    if json_output:
        emit_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            show(str(report))
    if any(report.problems for report in reports):
        raise typer.Exit(1)


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a variant or of a family.", metavar="DIR")],
    output: Annotated[
        Path | None, typer.Option(help="Write the whole repository here instead; a folder per variant for a family.")
    ] = None,
    namespace: Namespace = "your-name",
    name: Name = None,
    tag: Tag = "v1.0",
    facts: Facts = None,
    license: License = None,
    llm_license: LlmLicense = None,
    license_file: LicenseFile = None,
) -> None:
    """Write a variant's model card, and with a license everything else its repository needs.

    Scores and latencies come from results.json, the training record from run.json, both beside the variant. What only a
    person can say comes from facts.yaml (license, llm_license, datasets, intended_use, limitations, ...). Without a
    license a draft of the card is written, with the license shown as missing; it cannot be published.

    Example: fusedvlm card runs/quickstart --license apache-2.0 --output runs/published
    """
    require_folder(folder)
    from fusedvlm.hub_cards.release.variant_release import (
        build_release,
        check_target,
        draft,
        name_family,
        shared_weights,
        write_file,
    )

    from .facts import Common, find_stated

    given = {"license": license, "llm_license": llm_license, "license_files": tuple(map(str, license_file or ()))}
    members = name_family(folder, namespace, name)
    common = Common(shared_weights([variant for variant, _, _ in members]))
    for variant, repo_id, family in members:
        stated = find_stated(variant, facts, **given)
        names: dict[str, Any] = {"tag": tag, "family": family, "stated": stated, "common": common}
        if stated.license is None and output is None:
            files: Mapping[str, Path | bytes] = draft(variant, repo_id, **names)
            notes: Sequence[str] = ["a draft: no license is stated (facts.yaml or --license)"]
        else:
            release = build_release(variant, repo_id, **names)
            files, notes = release.files, release.notes
        target = variant if output is None else output if len(members) == 1 else output / repo_id.partition("/")[2]
        check_target(target, "facts.json")
        for path, content in files.items():
            write_file(target / path, content)
        say(f"{target / 'README.md'}: card of {repo_id}, {len(files)} files")
        for note in notes:
            say(f"  {note}")


def demo(
    model: Annotated[str, typer.Argument(help="Folder of a variant, or its Hub repository.", metavar="DIR|REPO")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    revision: Revision = None,
    picture: Annotated[
        list[Path] | None, typer.Option(help="A picture to offer; repeat it. By default those beside the variant.")
    ] = None,
) -> None:
    """Open a chat page for a variant: two m side by side, follow-up questions, what each answer cost.

    The page is the one that `fusedvlm space` writes; it needs gradio (pip install 'fusedvlm[space]').

    Example: fusedvlm demo runs/quickstart/fusedvlm-m32
    """
    require_folder_or_repository(model)
    from fusedvlm.hub_cards.release.demo_page import run_demo

    run_demo(model, revision, host, port, picture or [])


def space(
    source: Annotated[str, typer.Argument(help="Folder of a variant, or its Hub repository.", metavar="DIR|REPO")],
    output: Annotated[Path, typer.Option(help="Folder of the Space.")] = Path("space"),
    revision: Revision = None,
    repo_id: Annotated[
        str | None, typer.Option(help="For a folder: repository that the Space asks, instead of a copy in the Space.")
    ] = None,
) -> None:
    """Write a Gradio Space for a variant: an m slider, an image, a question, the answer as it comes.

    The Space runs as it is, here or on the Hub, and does not need this package: `pip install -r requirements.txt`,
    `python app.py`. From a folder it takes the model along; from a repository it asks that, pinned to a commit.

    \b
    Examples:
      fusedvlm space runs/published/fusedvlm-m32 --output runs/space   (with its card: see fusedvlm card --output)
      fusedvlm space your-name/fusedvlm-m32 --output runs/space
    """
    require_folder_or_repository(source)
    from fusedvlm.hub_cards.release.space import space_files
    from fusedvlm.hub_cards.release.variant_release import check_target, write_file

    files = space_files(source, revision, repo_id)
    check_target(output, "space.json")
    for path, content in files.items():
        write_file(output / path, content)
    if Path(source).is_dir() and repo_id is None and "model/README.md" not in files:
        say(f"{source} has no card, so the Space links none; write the repository with `fusedvlm card --output` first")
    say(f"{output}: a Space of {len(files)} files; try it with `python {output / 'app.py'}`")

"""`fusedvlm data ...`: look at, check, augment and write training data."""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedvlm.console import emit_json, say, show
from fusedvlm.data.generate.cli import documents, questions
from fusedvlm.data.sample_files import as_json, open_output
from fusedvlm.data.spec_options import Images, Json, Kind, Spec, check_spec, data_section

app = typer.Typer(
    name="data",
    help="Training data: check, show, convert, describe, and make more of it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def check(
    spec: Spec,
    kind: Kind = None,
    images: Images = None,
    drop: Annotated[
        Path | None,
        typer.Option(help="Write the samples whose images are all good to this .jsonl (a source of type chat)."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; one per CPU by default.")] = None,
    processor: Annotated[
        str | None,
        typer.Option(help="Variant, folder or Hub id, whose processor counts tokens; without one, words are counted."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a row; what the language model reads by default.")
    ] = None,
    overlong: Annotated[str, typer.Option(help="What training does with longer rows: drop or truncate.")] = "drop",
    num_visual_tokens: Annotated[
        int | None,
        typer.Option("--num-visual-tokens", "-m", min=1, help="m to count with."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Open every image of a training set, look at every conversation, and name what cannot be trained on.

    Images that are missing or damaged, questions and answers that are empty, rows that are too long; with a histogram
    of the rows' lengths. Ends with exit code 2 when there are any, unless --drop writes a list without them.

    Example: fusedvlm data check llava_v1_5_mix665k.json --type llava --images data/ --drop checked.jsonl
    """
    check_spec(spec, kind)
    from fusedvlm.data.prepare.image_check import check_images
    from fusedvlm.data.prepare.row_check import RowChecker, RowLimits
    from fusedvlm.data.sources.build_dataset import parse_data_spec
    from fusedvlm.data.sources.source_spec import load_source

    if drop is not None and drop.suffix != ".jsonl":
        raise ValueError(f"--drop {drop}: the list is JSON Lines, so end its name in .jsonl.")
    if processor is None and max_length is not None:
        raise ValueError("--max-length counts tokens: say with --processor FOLDER whose.")
    what: Any = overlong  # RowLimits refuses others than its two
    limits = RowLimits(max_length, what)
    checker = RowChecker(None if processor is None else load_processor(processor), limits, num_visual_tokens)
    sources, _ = parse_data_spec(data_section(spec, kind, images))
    report = check_images([load_source(source) for source in sources], workers, drop, checker=checker)
    dropped = sum(counts["unusable"] for counts in report.by_source.values())
    if json_output:
        emit_json({**report.as_dict(), "dropped": dropped if drop else 0})
    else:
        for name, counts in report.by_source.items():
            show(
                f"{name}: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count)
            )
        for line in report.rows.lines():
            show(line)
    if drop is None:
        report.require_good()
        return
    for name, counts in report.by_source.items():
        say(f"{name}: dropped {counts['unusable']} of {counts['samples']} samples.")
    for entry in report.bad:
        say(f"  {entry['image']}: {entry['reason']} ({entry['samples']} samples)")
    say(f"Wrote {report.samples - dropped} samples to {drop}.")


def load_processor(name: str) -> Any:
    """The processor of a variant.

    Raises:
        ValueError: when there is none.
    """
    from fusedvlm.processing import FusedVLMProcessor

    try:
        return FusedVLMProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--processor {name}: no processor of a variant there ({str(error)[:150]}).") from None


@app.command("show")
def show_samples(
    spec: Spec,
    kind: Kind = None,
    images: Images = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 3,
    json_output: Json = False,
) -> None:
    """Print the first samples of a training set, in the order in which it is mixed.

    Example: fusedvlm data show recipe.yaml -n 5
    """
    check_spec(spec, kind)
    from fusedvlm.data.prepare.export import one_epoch

    samples, total = one_epoch(data_section(spec, kind, images))
    chosen = [as_json(sample) for sample in islice(samples, count)]
    if json_output:
        emit_json({"samples": chosen, "total": total})
        return
    for sample in chosen:
        show(f"{sample['source']}  {sample['id']}")
        for image in sample["images"]:
            show(f"  image: {image if len(image) <= 200 else image[:60] + '...'}")
        for message in sample["messages"]:
            text = " ".join(part.get("text", "<image>") for part in message["content"])
            show(f"  {message['role']}: {text}")
    show(f"{'an unknown number of' if total is None else total} samples in an epoch")


@app.command()
def convert(
    spec: Spec,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    kind: Kind = None,
    images: Images = None,
    file_format: Annotated[str, typer.Option("--format", help="parquet or webdataset.")] = "parquet",
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 1000,
    keep_paths: Annotated[bool, typer.Option("--keep-paths", help="Write image paths in place of images.")] = False,
    num_proc: Annotated[int, typer.Option(min=1, help="Processes that write.")] = 1,
    json_output: Json = False,
) -> None:
    """Write one epoch of a training set as shards of the one conversation format, mixed, images inside.

    Example: fusedvlm data convert data.yaml --output shards/
    """
    check_spec(spec, kind)
    from fusedvlm.data.prepare.export import write_shards

    section = data_section(spec, kind, images)
    written = write_shards(section, output, file_format, rows_per_shard, not keep_paths, num_proc)
    if json_output:
        emit_json(written)
        return
    show(f"{written['samples']} samples with {written['images']} images in {written['shards']} files under {output}")


@app.command()
def manifest(
    spec: Spec,
    kind: Kind = None,
    images: Images = None,
    license: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TEXT, your reading of a source's license; repeat for several sources."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; standard output by default.")] = None,
) -> None:
    """Write what a training set is made of: counts, SHA-256 of the source files, licenses. Model cards are made of it.

    Example: fusedvlm data manifest data.yaml --license "llava=CC BY 4.0; images under their own terms" -o manifest.json
    """
    check_spec(spec, kind)
    from fusedvlm.data.prepare.export import make_manifest

    pairs = [entry.partition("=") for entry in license or []]
    if wrong := [name for name, equals, text in pairs if not (name and equals and text)]:
        raise ValueError(f"--license {wrong[0]}: write NAME=TEXT.")
    document = make_manifest(data_section(spec, kind, images), {name: text for name, _, text in pairs})
    if output is None:
        emit_json(document)
        return
    with open_output(output) as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    say(f"Wrote {output}.")


app.command()(questions)
app.command()(documents)

"""`fusedvlm data ...`: look at, check, augment and write training data."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="data",
    help="Training data: check, show, convert, describe, and make more of it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[
    str,
    typer.Argument(
        help="YAML with a data section (sources: [{type, path, ...}]), a recipe with one under data:, or a data file.",
        metavar="SPEC",
    ),
]
Kind = Annotated[
    str | None,
    typer.Option("--type", help="Layout of a data file: llava, svit, docdownstream, chat, webdataset, parquet."),
]
Images = Annotated[
    str | None, typer.Option("--images", help="Folder that image paths are relative to; the file's own by default.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def data_section(spec: str, kind: str | None, images: str | None) -> Any:
    """What SPEC, --type and --images mean together.

    Raises:
        ValueError: when they contradict each other.
    """
    from fusedvlm.data.sources.build_dataset import read_spec

    if spec.endswith((".yaml", ".yml")):
        if kind or images:
            raise ValueError("--type and --images describe a data file; in a YAML write type: and image_folder:.")
        return read_spec(spec)
    if kind is None:
        raise ValueError(f"Say with --type what layout {spec} has, or give a YAML with a data section.")
    return {"sources": [{"type": kind, "path": spec, "image_folder": images}]}


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
    json_output: Json = False,
) -> None:
    """Open every image of a training set and name those that are missing or damaged.

    Ends with exit code 2 when there are any, unless --drop writes a list without them.

    Example: fusedvlm data check llava_v1_5_mix665k.json --type llava --images data/ --drop checked.jsonl
    """
    from fusedvlm.console import emit_json, say, show
    from fusedvlm.data.prepare.image_check import check_images
    from fusedvlm.data.sources.build_dataset import parse_data_spec
    from fusedvlm.data.sources.source_spec import load_source

    if drop is not None and drop.suffix != ".jsonl":
        raise ValueError(f"--drop {drop}: the list is JSON Lines, so end its name in .jsonl.")
    sources, _ = parse_data_spec(data_section(spec, kind, images))
    report = check_images([load_source(source) for source in sources], workers, drop)
    if json_output:
        emit_json({**report.as_dict(), "dropped": report.affected if drop else 0})
    else:
        for name, counts in report.by_source.items():
            show(
                f"{name}: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count)
            )
    if drop is None:
        report.require_good()
        return
    for name, counts in report.by_source.items():
        say(f"{name}: dropped {counts['affected']} of {counts['samples']} samples.")
    for entry in report.bad:
        say(f"  {entry['image']}: {entry['reason']} ({entry['samples']} samples)")
    say(f"Wrote {report.samples - report.affected} samples to {drop}.")


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
    from itertools import islice

    from fusedvlm.console import emit_json, show
    from fusedvlm.data.prepare.export import one_epoch
    from fusedvlm.data.sample_files import as_json

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
    json_output: Json = False,
) -> None:
    """Write one epoch of a training set as shards of the one conversation format, mixed, images inside.

    Example: fusedvlm data convert data.yaml --output shards/
    """
    from fusedvlm.console import emit_json, show
    from fusedvlm.data.prepare.export import write_shards

    section = data_section(spec, kind, images)
    written = write_shards(section, output, file_format, rows_per_shard, embed_images=not keep_paths)
    if json_output:
        emit_json(written)
        return
    show(f"{written['samples']} samples with {written['images']} images in {written['shards']} files under {output}")


@app.command()
def manifest(
    spec: Spec,
    kind: Kind = None,
    images: Images = None,
    licence: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TEXT, your reading of a source's licence; repeat for several sources."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; standard output by default.")] = None,
) -> None:
    """Write what a training set is made of: counts, SHA-256 of the source files, licences. Model cards are made of it.

    Example: fusedvlm data manifest data.yaml --licence "llava=CC BY 4.0; images under their own terms" -o manifest.json
    """
    import json

    from fusedvlm.console import emit_json, say
    from fusedvlm.data.prepare.export import make_manifest
    from fusedvlm.data.sample_files import open_output

    pairs = [entry.partition("=") for entry in licence or []]
    if wrong := [name for name, equals, text in pairs if not (name and equals and text)]:
        raise ValueError(f"--licence {wrong[0]}: write NAME=TEXT.")
    document = make_manifest(data_section(spec, kind, images), {name: text for name, _, text in pairs})
    if output is None:
        emit_json(document)
        return
    with open_output(output) as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    say(f"Wrote {output}.")


Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="JSON Lines file of samples; <output>.journal beside it keeps all answers."),
]
BaseUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible endpoint up to and with /v1, such as http://localhost:8000/v1.")
]
KeyName = Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key. Never printed.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.")]


def require_answers(report: dict[str, Any]) -> None:
    """End with exit code 1 when requests stayed without an answer: the output is not complete.

    Raises:
        RuntimeError: saying how many, and what to do.
    """
    if report["unanswered"]:
        raise RuntimeError(f"{report['unanswered']} requests had no answer; run the same command again to repeat them.")


def endpoint_or_local(base_url: str | None, model: str | None, local: str | None) -> None:
    """Check that one of the two is asked for.

    Raises:
        ValueError: when neither or both are.
    """
    if (local is None) == (base_url is None) or (base_url is not None and model is None):
        raise ValueError("Give --base-url and --model for an endpoint, or --local for a model that runs here.")


@app.command()
def questions(
    spec: Spec,
    output: Output,
    kind: Kind = None,
    images: Images = None,
    base_url: BaseUrl = None,
    model: Annotated[str | None, typer.Option(help="Name of the endpoint's model.")] = None,
    local: Annotated[str | None, typer.Option(help="Folder or Hub id of a chat model to run here instead.")] = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="yes_no or multiple_choice; repeat for both, the default.")
    ] = None,
    per_description: Annotated[int, typer.Option(min=1, help="Questions of each kind per description.")] = 4,
    min_words: Annotated[int, typer.Option(min=1, help="Leave out descriptions that are shorter.")] = 20,
    concurrency: Concurrency = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest words.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    api_key_env: KeyName = "OPENAI_API_KEY",
    json_output: Json = False,
) -> None:
    """Let a language model write yes/no and multiple-choice questions from detailed descriptions of images.

    Questions in the wrong form are dropped and counted by reason. A killed run goes on where it was when the same
    command is given again; nothing is asked twice.

    Example: fusedvlm data questions detail_description.json --type svit --images vg/ --base-url http://localhost:8000/v1
    --model my-llm -o questions.jsonl
    """
    from fusedvlm.console import emit_json, show
    from fusedvlm.data.generate.answer_filters import KINDS
    from fusedvlm.data.generate.llm_client import Endpoint, LocalModel
    from fusedvlm.data.generate.questions import QuestionOptions, write_questions
    from fusedvlm.data.prepare.export import every_sample

    endpoint_or_local(base_url, model, local)
    samples = every_sample(data_section(spec, kind, images))
    author = f"{local or f'{base_url} {model}'} {temperature} {seed} {max_tokens}"
    options = QuestionOptions(
        tuple(kinds or KINDS), per_description, min_words, author, concurrency if local is None else 1
    )
    if local is None:
        ask = Endpoint(base_url, model, api_key_env, max_tokens, temperature, seed)
    else:
        ask = LocalModel(local, max_tokens, temperature, seed)
    report = write_questions(samples, output, ask, options)
    if json_output:
        emit_json(report)
    else:
        for name in options.kinds:
            dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"][name].items()) or "none"
            show(f"{name}: kept {report['kept'].get(name, 0)}, answers {report['answers'][name]}, dropped: {dropped}")
        show(f"{sum(report['kept'].values())} questions about {report['descriptions']} images in {output}")
    require_answers(report)


@app.command()
def documents(
    spec: Spec,
    output: Output,
    kind: Kind = None,
    images: Images = None,
    local: Annotated[str | None, typer.Option(help="Page reader to run here: a folder or Hub id of nougat.")] = None,
    base_url: BaseUrl = None,
    model: Annotated[str | None, typer.Option(help="Name of the endpoint's model; it must take images.")] = None,
    embedding_model: Annotated[
        str | None,
        typer.Option(help="Sentence embeddings: a folder or Hub id; 'none' leaves the similarity filter out."),
    ] = "sentence-transformers/all-mpnet-base-v2",
    min_words: Annotated[int, typer.Option(min=0, help="Shortest reading.")] = 30,
    min_ratio: Annotated[float, typer.Option(help="Least length of the reading per length of the page's text.")] = 0.5,
    max_ratio: Annotated[float, typer.Option(help="Largest such ratio.")] = 2.0,
    max_repetition: Annotated[float, typer.Option(help="Largest share of repeated runs of eight words.")] = 0.2,
    min_similarity: Annotated[float, typer.Option(help="Least cosine of the two texts' embeddings.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reading.")] = 3584,
    concurrency: Concurrency = 8,
    api_key_env: KeyName = "OPENAI_API_KEY",
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for what runs here.")] = None,
    json_output: Json = False,
) -> None:
    """Read pages of documents again and keep readings that agree with the page's own text.

    Four filters: length, length ratio, repetition, similarity of sentence embeddings. A killed run goes on where it
    was; with other limits the same command filters anew without reading again.

    Example: fusedvlm data documents ccpdf.jsonl --type docdownstream --local facebook/nougat-base -o pages.jsonl
    """
    from fusedvlm.console import emit_json, show
    from fusedvlm.data.generate.answer_filters import PageLimits
    from fusedvlm.data.generate.documents import EndpointReader, NougatReader, SentenceEmbedder, read_documents
    from fusedvlm.data.generate.llm_client import Endpoint
    from fusedvlm.data.prepare.export import every_sample

    endpoint_or_local(base_url, model, local)
    limits = PageLimits(min_words, min_ratio, max_ratio, max_repetition, min_similarity=min_similarity)
    embed = None if embedding_model in (None, "none") else SentenceEmbedder(embedding_model, device=device)
    if local is None:
        read = EndpointReader(Endpoint(base_url, model, api_key_env, max_tokens))
    else:
        read, concurrency = NougatReader(local, max_tokens, device), 1
    author = f"{local or f'{base_url} {model}'} {max_tokens} {embedding_model}"
    samples = every_sample(data_section(spec, kind, images))
    report = read_documents(samples, output, read, embed, limits, author, concurrency)
    if json_output:
        emit_json(report)
    else:
        dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
        show(f"kept {report['kept']} of {report['pages']} pages in {output}; dropped: {dropped}")
    require_answers(report)

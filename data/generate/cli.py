"""`fusedvlm data questions` and `fusedvlm data documents`: training data made by models."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedvlm.console import emit_json, say, show
from fusedvlm.data.generate.answer_filters import KINDS, PageLimits
from fusedvlm.data.generate.journal import Journal
from fusedvlm.data.generate.llm_client import Endpoint, LocalModel, RateLimit
from fusedvlm.data.generate.questions import QuestionOptions, prompts_of, write_questions
from fusedvlm.data.prepare.shard import Shard
from fusedvlm.data.spec_options import Images, Json, Kind, Spec, check_spec, data_section

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="JSON Lines file of samples; <output>.journal beside it keeps all answers."),
]
BaseUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible endpoint up to and with /v1, such as http://localhost:8000/v1.")
]
KeyName = Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key. Never printed.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.")]


Shards = Annotated[
    str | None,
    typer.Option("--shard", help="K/N, such as 3/16: do this part only, in OUTPUT-00003-of-00016.jsonl."),
]
Rpm = Annotated[float | None, typer.Option("--requests-per-minute", help="Most requests per minute.")]
Tpm = Annotated[float | None, typer.Option("--tokens-per-minute", help="Most tokens per minute, as the server counts.")]
BatchOut = Annotated[
    Path | None,
    typer.Option(help="Ask nothing now: write the requests to this folder as OpenAI Batch files (vllm run-batch)."),
]
BatchIn = Annotated[
    list[str] | None, typer.Option(help="Take the answers from such a batch's output files, or a pattern of them.")
]
Retry = Annotated[bool, typer.Option("--retry-declined", help="Ask again for what was refused or cut before.")]


def require_answers(report: dict[str, Any]) -> None:
    """End with exit code 1 when requests stayed without an answer: the output is not complete.

    Raises:
        RuntimeError: saying how many, and what to do.
    """
    if report["unanswered"]:
        raise RuntimeError(f"{report['unanswered']} requests had no answer; run the same command again to repeat them.")


def say_declined(report: dict[str, Any], output: Path) -> None:
    """Say how many requests got no usable reply, and where they are listed."""
    if report["refused"] or report["cut"]:
        say(f"{report['refused']} requests were refused and {report['cut']} replies cut; see {output}.declined.jsonl.")


def choose_route(
    base_url: str | None, model: str | None, local: str | None, batch_out: Path | None, batch_in: list[str] | None
) -> str:
    """How answers are had: endpoint, local, write or read (batch files).

    Raises:
        ValueError: when none or several are asked for.
    """
    asked = {"endpoint": base_url, "local": local, "write": batch_out, "read": batch_in}
    routes = [name for name, value in asked.items() if value]
    if len(routes) != 1 or (routes[0] != "local" and model is None):
        raise ValueError(
            "Give --base-url and --model for an endpoint, --local for a model that runs here, or --model and "
            "--batch-out (then --batch-in) for an offline batch."
        )
    return routes[0]


def answer_entry(name: str, text: str, **more: Any) -> dict[str, Any]:
    """Journal entry of an answer."""
    return {name: text, **more}


def write_or_read_batch(
    requests: Callable[[], Any],
    keys: Callable[[], Iterable[str]],
    output: Path,
    ask: Any,
    entry_of: Callable[[str], dict[str, Any]],
    batch_out: Path | None,
    batch_in: list[str] | None,
    retry_declined: bool,
) -> bool:
    """One half of an offline batch; True when that is all there is to do now.

    Args:
        requests: gives key and conversation of each.
        keys: gives the keys alone.
        output: of the command; the journal lies beside it.
        ask: an endpoint, for the bodies of the requests.
        entry_of: text of an answer to its journal entry.
        batch_out, batch_in, retry_declined: options of the command.
    """
    from fusedvlm.data.generate.offline_batch import read_batches, write_batches

    with Journal(f"{output}.journal") as journal:
        if retry_declined:
            journal.forget("refused", "cut")
        if batch_out is not None:
            written = write_batches(requests(), batch_out, ask.body, journal)
            show(f"{written['requests']} requests in {written['files']} files under {batch_out}")
            return True
        counts = read_batches(batch_in or [], keys(), journal, entry_of)
        say("Read " + ", ".join(f"{count} {what}" for what, count in counts.items() if count) + ".")
    return False


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
    shard: Shards = None,
    requests_per_minute: Rpm = None,
    tokens_per_minute: Tpm = None,
    batch_out: BatchOut = None,
    batch_in: BatchIn = None,
    retry_declined: Retry = False,
    json_output: Json = False,
) -> None:
    """Let a language model write yes/no and multiple-choice questions from detailed descriptions of images.

    Questions in the wrong form are dropped and counted by reason; requests that were refused and replies that were cut
    are listed in <output>.declined.jsonl. A killed run goes on where it was when the same command is given again;
    nothing is asked twice.

    Example: fusedvlm data questions detail_description.json --type svit --images vg/ --base-url http://localhost:8000/v1
    --model my-llm -o questions.jsonl

    Offline: the same with --batch-out FOLDER in place of --base-url, then with --batch-in "ANSWERS*.jsonl".
    """
    check_spec(spec, kind)
    from fusedvlm.data.prepare.export import EverySample

    route, part = choose_route(base_url, model, local, batch_out, batch_in), Shard.parse(shard)
    samples, output = EverySample(data_section(spec, kind, images), part), part.name(output)
    author = f"{local or model} {temperature} {seed} {max_tokens}"
    asked: Any = tuple(kinds or KINDS)
    options = QuestionOptions(
        asked, per_description, min_words, author, concurrency if local is None else 1, retry_declined
    )
    if local is None:
        rate = RateLimit(requests_per_minute, tokens_per_minute)
        address = base_url or "http://offline/v1"
        ask: Any = Endpoint(address, str(model), api_key_env, max_tokens, temperature, seed, rate=rate)
    else:
        ask = LocalModel(local, max_tokens, temperature, seed)
    if route in ("write", "read"):
        requests = partial(prompts_of, samples, options)
        entry_of = partial(answer_entry, "reply")
        keys = lambda: (key for key, _ in requests())  # noqa: E731
        if write_or_read_batch(requests, keys, output, ask, entry_of, batch_out, batch_in, retry_declined):
            return
    report = write_questions(samples, output, None if route == "read" else ask, options)
    if json_output:
        emit_json(report)
    else:
        for name in options.kinds:
            dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"][name].items()) or "none"
            show(f"{name}: kept {report['kept'].get(name, 0)}, answers {report['answers'][name]}, dropped: {dropped}")
        show(f"{sum(report['kept'].values())} questions about {report['descriptions']} images in {output}")
    say_declined(report, output)
    require_answers(report)


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
    shard: Shards = None,
    requests_per_minute: Rpm = None,
    tokens_per_minute: Tpm = None,
    batch_out: BatchOut = None,
    batch_in: BatchIn = None,
    retry_declined: Retry = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for what runs here.")] = None,
    json_output: Json = False,
) -> None:
    """Read pages of documents again and keep readings that agree with the page's own text.

    Four filters: length, length ratio, repetition, similarity of sentence embeddings. A killed run goes on where it
    was; with other limits the same command filters anew without reading again.

    Example: fusedvlm data documents ccpdf.jsonl --type docdownstream --local facebook/nougat-base -o pages.jsonl
    """
    from fusedvlm.data.generate.documents import (
        EndpointReader,
        NougatReader,
        SentenceEmbedder,
        keys_of_pages,
        prompts_of_pages,
        read_documents,
    )

    check_spec(spec, kind)
    from fusedvlm.data.prepare.export import EverySample

    route, part = choose_route(base_url, model, local, batch_out, batch_in), Shard.parse(shard)
    limits = PageLimits(min_words, min_ratio, max_ratio, max_repetition, min_similarity=min_similarity)
    is_compared = embedding_model not in (None, "none") and route != "write"
    embed = SentenceEmbedder(str(embedding_model), device=device) if is_compared else None
    if local is None:
        rate = RateLimit(requests_per_minute, tokens_per_minute)
        address = base_url or "http://offline/v1"
        read: Any = EndpointReader(Endpoint(address, str(model), api_key_env, max_tokens, rate=rate))
    else:
        read, concurrency = NougatReader(local, max_tokens, device), 1
    author = f"{local or model} {max_tokens} {embedding_model}"
    samples, output = EverySample(data_section(spec, kind, images), part), part.name(output)
    if route in ("write", "read"):
        requests = partial(prompts_of_pages, samples, read, author)
        entry_of = partial(answer_entry, "reading", similarity=None)
        keys = partial(keys_of_pages, samples, author)
        if write_or_read_batch(requests, keys, output, read.ask, entry_of, batch_out, batch_in, retry_declined):
            return
    asked = None if route == "read" else read
    report = read_documents(samples, output, asked, embed, limits, author, concurrency, retry_declined)
    if json_output:
        emit_json(report)
    else:
        dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
        show(f"kept {report['kept']} of {report['pages']} pages in {output}; dropped: {dropped}")
    say_declined(report, output)
    require_answers(report)

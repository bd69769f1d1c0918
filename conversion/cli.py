"""`fusedvlm convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusedvlm.console import emit_json, show


def convert(
    source: Annotated[
        Path, typer.Argument(help="Published checkpoint folder (with --to-published: a variant folder).")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to_published: Annotated[
        bool, typer.Option("--to-published", help="The way back: a variant becomes a published checkpoint folder.")
    ] = False,
    text_model: Annotated[
        str | None,
        typer.Option(help="Refer to this LLM instead of copying it; its weights must equal the checkpoint's."),
    ] = None,
    text_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of --text-model.")] = None,
    conversation: Annotated[
        str | None, typer.Option(help="Published chat template; by default the one the LLM's vocabulary calls for.")
    ] = None,
    views_only: Annotated[
        bool, typer.Option("--views-only", help="A published 'vision query only' variant: questions are not fused.")
    ] = False,
    num_visual_tokens: Annotated[int | None, typer.Option("-m", "--num-visual-tokens", min=1, help="m.")] = None,
    num_followup_visual_tokens: Annotated[int | None, typer.Option(min=1, help="m'.")] = None,
    max_local_views: Annotated[int | None, typer.Option(min=0, help="HD setting (HD-9 is 9).")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder of the LLM's tokenizer.")] = None,
    query_tokenizer: Annotated[str | None, typer.Option(help="Folder of the fusion module's tokenizer.")] = None,
    vision_model: Annotated[
        str | None, typer.Option(help="Vision tower of a QueCC checkpoint, which has none; its config's by default.")
    ] = None,
    published_answer_mask: Annotated[
        bool, typer.Option("--published-answer-mask", help="Stage 1 with the published batch-dependent mask.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Turn a published research checkpoint into a variant, or a variant back into one.

    Sizes are read from the tensors, pickled code is never run, and a key that is not expected is an error.

    Example: fusedvlm convert checkpoints/256_8_hd_llama-2 variants/256 --text-model meta-llama/Llama-2-7b-chat-hf
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder.")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} is not one of float32, bfloat16, float16.")
    if to_published:
        from .published_export import export_published

        report = export_published(str(source), str(output))
    else:
        from .convert import ConversionOptions, convert_published

        options = ConversionOptions(
            text_model=text_model,
            text_revision=text_revision,
            conversation=conversation,
            fuse_question=not views_only,
            num_visual_tokens=num_visual_tokens,
            num_followup_visual_tokens=num_followup_visual_tokens,
            max_local_views=max_local_views,
            tokenizer=tokenizer,
            query_tokenizer=query_tokenizer,
            vision_model=vision_model,
            published_answer_mask=published_answer_mask,
            dtype=dtype,
        )
        report = convert_published(str(source), str(output), options)
    if json_output:
        emit_json(report.as_dict())
    else:
        _show(report)


def _show(report: Any) -> None:
    for name in report.used:
        show(f"kept     {name}")
    for old, new in report.renamed:
        show(f"renamed  {old} -> {new}")
    for name, reason in report.dropped:
        show(f"dropped  {name} ({reason})")
    for name, value in report.sizes.items():
        shown = ", ".join(f"{key} {number}" for key, number in value.items()) if isinstance(value, dict) else value
        show(f"size     {name}: {shown}")
    for note in report.notes:
        show(f"note     {note}")
    total = len(report.used) + len(report.renamed) + len(report.dropped)
    show(
        f"{total} keys ({report.stage}): {len(report.used)} kept, {len(report.renamed)} renamed, "
        f"{len(report.dropped)} dropped. Written to {report.output}."
    )

"""`fusedvlm describe`."""

import time
from typing import Annotated, Any

import typer

from fusedvlm.console import emit_json, progress, show
from fusedvlm.model_source import require_source

DEFAULT_QUESTION = "Describe the image."


def describe(
    images: Annotated[list[str], typer.Argument(help="Images: paths, URLs or base64 strings.", metavar="IMAGE...")],
    model: Annotated[str, typer.Option("--model", help="Variant folder or Hub repository.")],
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            help=f"A question, {DEFAULT_QUESTION!r} without one; repeat the option to ask several in turn.",
        ),
    ] = None,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(
            "--num-visual-tokens",
            "-m",
            help="m, visual tokens per image, or auto: chosen from the first question, where the variant is calibrated "
            "(fusedvlm scaling calibrate); the variant's own by default.",
        ),
    ] = None,
    round_down: Annotated[
        bool, typer.Option("--round-down", help="Where m was not trained, take the next smaller one that was.")
    ] = False,
    together: Annotated[
        bool, typer.Option("--together", help="Show all images in one conversation instead of one each.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the repository.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Ask a variant questions about images.

    Several questions are asked one after the other in the same conversation, each about every image shown.

    Example: fusedvlm describe cat.jpg dog.jpg -q "What animal is this?" -q "Which colour?" --model DIR -m 8
    """
    questions = question or [DEFAULT_QUESTION]
    empty = [number for number, text in enumerate(questions) if not text.strip()]
    if empty:
        raise ValueError(f"Question {empty[0]} is empty; ask something about the image.")
    asked = read_count(num_visual_tokens)
    require_source("--model", model, "config.json")
    from fusedvlm.processing.image_processing_fusedvlm_loading import load_image

    loaded = [load_image(source) for source in images]
    from .chat import VisualChat

    chat = VisualChat(model, revision=revision, device=device)
    own = chat.model.config.num_visual_tokens
    first = chat.served(asked, questions[0]) if isinstance(asked, str) else asked
    chat.model.config.check_num_visual_tokens(own if first is None else first)
    if round_down:
        chat.round_down()
    groups = [(images, loaded)] if together else [([name], [image]) for name, image in zip(images, loaded, strict=True)]
    records = []
    for names, shown in progress(groups, description="answering", disable=len(groups) == 1):
        records += _converse(chat, names, shown, questions, asked, max_new_tokens)
    if json_output:
        emit_json({"model": model, "answers": records})
        return
    for record in records:
        show(f"{' + '.join(record['images'])}\n  Q: {record['question']}\n  A: {record['answer']}")


def read_count(text: str | None) -> int | str | None:
    """m as it is typed: a number, "auto", or nothing.

    Raises:
        ValueError: for anything else.
    """
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"-m {text!r}: write a whole number of visual tokens, or auto.") from None


def _converse(
    chat: Any, names: list[str], images: list, questions: list[str], m: int | str | None, max_new_tokens: int
) -> list[dict]:
    """Ask all questions in one conversation."""
    from .chat import user_message

    conversation, records = [], []
    for number, text in enumerate(questions):
        conversation.append(user_message(images if number == 0 else [], text))
        started = time.perf_counter()
        answer = chat.reply_batch([conversation], m, max_new_tokens)[0]
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        records.append(
            {
                "images": list(names),
                "question": text,
                "answer": answer,
                "num_visual_tokens": chat.served(m, questions[0]),
                "seconds": round(time.perf_counter() - started, 4),
            }
        )
    return records

"""Pages of documents read again by a better reader (nougat), kept where the reading agrees with the page's own text."""

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer, VisionEncoderDecoderModel

from fusedvlm.console import progress, say
from fusedvlm.data.sample_files import as_json, open_output
from fusedvlm.data.sources.converters import Sample
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image

from .answer_filters import PageLimits, cosine, reading_problem
from .journal import Journal
from .llm_client import Ask, Declined, Messages, is_cut
from .parallel_work import Task, run_tasks
from .questions import declined_file, description_of, plain, read_again, task_key

FOLDER = Path(__file__).parent
Read = Callable[[Any], str]  # image (path or bytes) to its text
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]


class NougatReader:
    """A page reader of transformers: nougat, or any vision encoder-decoder with a processor.

    Args:
        model: folder or Hub id, such as facebook/nougat-base.
        max_tokens: of a page.
        device: "cpu", "cuda"; by default CUDA where there is one.
    """

    def __init__(self, model: str, max_tokens: int = 3584, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(model)
        tower: Any = VisionEncoderDecoderModel.from_pretrained(model)
        self.model = tower.to(self.device).eval()
        self.max_tokens = max_tokens

    def __call__(self, image: Any) -> str:
        """Text of a page, as Markdown.

        Raises:
            ValueError: naming an image that cannot be opened.
            Declined: when the reading was cut at `max_tokens`.
        """
        pixels = self.processor(images=load_image(image), return_tensors="pt")["pixel_values"].to(self.device)
        with torch.no_grad():
            tokens = self.model.generate(pixels.to(self.model.dtype), max_new_tokens=self.max_tokens, do_sample=False)
        if is_cut(tokens[0].tolist(), self.max_tokens, self.model.generation_config.eos_token_id):
            raise Declined("cut", f"the reading was cut after {self.max_tokens} tokens")
        # As the model writes it: nougat's own post-processing needs two more libraries to cut endless repetition, which
        # the filters drop.
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


class EndpointReader:
    """A page reader behind an OpenAI-compatible endpoint that takes images."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.prompt = (FOLDER / "transcribe_page.jinja").read_text(encoding="utf-8").strip()

    def __call__(self, image: Any) -> str:
        """Text of a page."""
        return self.ask(self.messages(image))

    def cancel(self) -> None:
        """Wake what waits; the run is being stopped."""
        getattr(self.ask, "cancel", lambda: None)()

    def messages(self, image: Any) -> Messages:
        """What is asked about a page.

        Raises:
            ValueError: naming an image that cannot be opened.
        """
        buffer = io.BytesIO()
        load_image(image).save(buffer, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": parts}]


class SentenceEmbedder:
    """Sentence embeddings of transformers: the mean of the last states over the tokens, as all-mpnet-base-v2 has them.

    Args:
        model: folder or Hub id, such as sentence-transformers/all-mpnet-base-v2.
        max_length: tokens of a text; what is longer is cut.
        device: "cpu", "cuda"; by default CUDA where there is one.
    """

    def __init__(self, model: str, max_length: int = 384, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model).to(self.device).eval()
        self.max_length = max_length
        self.lock = threading.Lock()  # tokenizers do not serve two threads at a time

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Unit vectors of texts, (texts, width)."""
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        with self.lock:
            encoded = self.tokenizer(list(texts), **options).to(self.device)
        with torch.no_grad():
            states = self.model(**encoded).last_hidden_state.float()
        mask = encoded["attention_mask"].unsqueeze(-1).float()
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=-1).tolist()


def read_documents(
    samples: Iterable[Sample],
    output: str | Path,
    read: Read | None,
    embed: Embed | None,
    limits: PageLimits,
    author: str,
    concurrency: int = 1,
    retry_declined: bool = False,
) -> dict[str, Any]:
    """Read every page again and keep the readings that pass the four filters.

    Each reading goes to `<output>.journal` at once, with its similarity, so a killed run goes on, and other limits can
    be tried without reading again. A page that cannot be opened is dropped, with its name in the journal, and looked at
    again in the next run; pages the reader refused and readings that were cut are in `<output>.declined.jsonl`. However
    many pages there are, a few are in memory.

    Args:
        samples: with one image and its text as the last answer (CCpdf pages of mPLUG's DocStruct4M). They are read
            twice, in the same order.
        output: JSON Lines file of samples: the same question, the reading as its answer (a `chat` source).
        read: image to text; None judges what is in the journal alone.
        embed: texts to vectors; None leaves the similarity filter out.
        limits: of the filters.
        author: what reads and embeds; a change reads everything again.
        concurrency: pages at a time.
        retry_declined: read again what was refused or cut before.

    Returns:
        The report: pages, kept, dropped by reason, pages that were refused, cut, or stayed without an answer.

    Raises:
        ValueError: when no sample has an image, or the endpoint refuses.
        Unanswered: when the endpoint is silent.
    """
    samples = read_again(samples)
    with Journal(f"{output}.journal") as journal:
        if retry_declined:
            journal.forget("refused", "cut")
        if read is not None:
            journal.forget("problem")
            tasks = (
                Task(page_key(page, author), partial(read_page, page, read, embed), page["id"])
                for page in pages_of(samples)
            )
            total = length_hint(samples) or None
            run_tasks(tasks, journal, concurrency, "Reading pages", total, getattr(read, "cancel", None))
        return plain(collect_pages(samples, output, journal, embed, limits, author))


def pages_of(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Samples with exactly one image."""
    return (sample for sample in samples if len(sample["images"]) == 1)


def prompts_of_pages(
    samples: Iterable[Sample], reader: "EndpointReader", author: str
) -> Iterator[tuple[str, Messages]]:
    """Key and conversation of every page that can be opened, for `offline_batch`."""
    for page in pages_of(samples):
        try:
            yield page_key(page, author), reader.messages(page["images"][0])
        except ValueError as error:
            say(f"{page['id']}: {error}")


def keys_of_pages(samples: Iterable[Sample], author: str) -> Iterator[str]:
    """Keys of the same conversations, without opening a picture."""
    return (page_key(page, author) for page in pages_of(samples))


def collect_pages(
    samples: Iterable[Sample],
    output: str | Path,
    journal: Journal,
    embed: Embed | None,
    limits: PageLimits,
    author: str,
) -> dict[str, Any]:
    """Write the readings in the journal that pass the filters, and count.

    Raises:
        ValueError: when no sample has exactly one image.
    """
    report: dict[str, Any] = {"pages": 0, "kept": 0, "dropped": Counter(), "unanswered": 0, "refused": 0, "cut": 0}
    others = 0
    with open_output(output) as file, declined_file(output) as declined:
        for page in progress(samples, "Filtering readings", length_hint(samples) or None):
            if len(page["images"]) != 1:
                others += 1
                continue
            report["pages"] += 1
            entry = journal.get(page_key(page, author))
            if entry is None and not is_readable(page):  # a batch never asks about it
                report["dropped"]["image cannot be read"] += 1
            elif entry is None:
                report["unanswered"] += 1
            elif entry["kind"] in ("refused", "cut"):
                report[entry["kind"]] += 1
                declined.add(page, entry)
            elif entry["kind"] == "problem":
                report["dropped"]["image cannot be read"] += 1
            else:
                reading, similarity = entry["reading"], entry["similarity"]
                if similarity is None and embed is not None:  # of a batch: judged now, and remembered
                    similarity = compare(page, reading, embed)
                    journal.add({**entry, "similarity": similarity})
                problem = reading_problem(description_of(page), reading, similarity, limits)
                if problem is not None:
                    report["dropped"][problem] += 1
                    continue
                report["kept"] += 1
                file.write(json.dumps(page_sample(page, reading), ensure_ascii=False) + "\n")
        if not report["pages"]:
            raise ValueError(f"None of {others} samples has exactly one image: these are no pages.")
    if others:
        report["dropped"]["not one image"] = others
    return report


def is_readable(page: Sample) -> bool:
    """Whether a page's image can be opened."""
    try:
        load_image(page["images"][0])
    except (ValueError, OSError):
        return False
    return True


def page_key(page: Sample, author: str) -> str:
    """Name of a page's reading and all that it depends on."""
    return task_key(author, as_json(page)["images"][0], description_of(page))


def read_page(page: Sample, read: Read, embed: Embed | None) -> dict[str, Any]:
    """Journal entry of a page."""
    try:
        load_image(page["images"][0])
    except ValueError as error:
        return {"kind": "problem", "id": page["id"], "problem": str(error)}
    reading = read(page["images"][0])
    similarity = None if embed is None else compare(page, reading, embed)
    return {"id": page["id"], "reading": reading, "similarity": similarity}


def compare(page: Sample, reading: str, embed: Embed) -> float:
    """Cosine of a page's own text and a reading of it."""
    original = description_of(page)
    return cosine(*embed([original, reading])) if original.strip() and reading.strip() else 0.0


def page_sample(page: Sample, reading: str) -> dict[str, Any]:
    """A page with the reading in place of its text."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": reading}]}
    return {
        "id": f"{page['id']}-reread",
        "source": f"re-read {page['source']}",
        "images": as_json(page)["images"],
        "messages": [*page["messages"][:-1], answer],
    }

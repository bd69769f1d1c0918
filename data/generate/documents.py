"""Pages of documents read again by a better reader (nougat), kept where the reading agrees with the page's own text."""

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fusedvlm.data.sample_files import Journal, as_json, open_output
from fusedvlm.data.sources.converters import Sample
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image

from .answer_filters import PageLimits, cosine, reading_problem
from .llm_client import Ask
from .parallel_work import Task, run_tasks
from .questions import description_of, plain, task_key

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

    def __init__(self, model: str, max_tokens: int = 3584, device: str | None = None):
        import torch
        from transformers import AutoProcessor, VisionEncoderDecoderModel

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = VisionEncoderDecoderModel.from_pretrained(model).to(self.device).eval()
        self.max_tokens = max_tokens

    def __call__(self, image: Any) -> str:
        """Text of a page, as Markdown.

        Raises:
            ValueError: naming an image that cannot be opened.
        """
        import torch

        pixels = self.processor(images=load_image(image), return_tensors="pt")["pixel_values"].to(self.device)
        with torch.no_grad():
            tokens = self.model.generate(pixels.to(self.model.dtype), max_new_tokens=self.max_tokens, do_sample=False)
        # As the model writes it: nougat's own post-processing needs two more libraries to cut endless repetition, which
        # the filters drop.
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


class EndpointReader:
    """A page reader behind an OpenAI-compatible endpoint that takes images."""

    def __init__(self, ask: Ask):
        self.ask = ask
        self.prompt = (FOLDER / "transcribe_page.jinja").read_text(encoding="utf-8").strip()

    def __call__(self, image: Any) -> str:
        """Text of a page."""
        buffer = io.BytesIO()
        load_image(image).save(buffer, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": self.prompt}]
        return self.ask([{"role": "user", "content": parts}])


class SentenceEmbedder:
    """Sentence embeddings of transformers: the mean of the last states over the tokens, as all-mpnet-base-v2 has them.

    Args:
        model: folder or Hub id, such as sentence-transformers/all-mpnet-base-v2.
        max_length: tokens of a text; what is longer is cut.
        device: "cpu", "cuda"; by default CUDA where there is one.
    """

    def __init__(self, model: str, max_length: int = 384, device: str | None = None):
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model).to(self.device).eval()
        self.max_length = max_length
        self.lock = threading.Lock()  # tokenizers do not serve two threads at a time

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Unit vectors of texts, (texts, width)."""
        import torch

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
    read: Read,
    embed: Embed | None,
    limits: PageLimits,
    author: str,
    concurrency: int = 1,
) -> dict[str, Any]:
    """Read every page again and keep the readings that pass the four filters.

    Each reading goes to `<output>.journal` at once, with its similarity, so a killed run goes on, and other limits can
    be tried without reading again. A page that cannot be opened is dropped, with its name in the journal, and looked at
    again in the next run.

    Args:
        samples: with one image and its text as the last answer (CCpdf pages of mPLUG's DocStruct4M).
        output: JSON Lines file of samples: the same question, the reading as its answer (a `chat` source).
        read: image to text.
        embed: texts to vectors; None leaves the similarity filter out.
        limits: of the filters.
        author: what reads and embeds; a change reads everything again.
        concurrency: pages at a time.

    Returns:
        The report: pages, kept, dropped by reason, pages without an answer.

    Raises:
        ValueError: when no sample has an image, or the endpoint refuses.
        Unanswered: when the endpoint is silent.
    """
    samples = list(samples)
    pages = [sample for sample in samples if len(sample["images"]) == 1]
    if not pages:
        raise ValueError(f"None of {len(samples)} samples has exactly one image: these are no pages.")
    dropped: Counter = Counter()
    dropped["not one image"] += len(samples) - len(pages)
    with Journal(f"{output}.journal") as journal:
        journal.forget(lambda entry: "problem" in entry)
        tasks = (Task(page_key(page, author), partial(read_page, page, read, embed)) for page in pages)
        unanswered = run_tasks(tasks, journal, concurrency, "Reading pages")
    kept = 0
    with open_output(output) as file:
        for page in pages:
            entry = journal.entries.get(page_key(page, author))
            if entry is None:
                continue
            problem = entry.get("problem") or reading_problem(
                description_of(page), entry["reading"], entry["similarity"], limits
            )
            if problem is not None:
                dropped["image cannot be read" if entry.get("problem") else problem] += 1
                continue
            kept += 1
            file.write(json.dumps(page_sample(page, entry["reading"]), ensure_ascii=False) + "\n")
    return plain({"pages": len(pages), "kept": kept, "dropped": +dropped, "unanswered": unanswered})


def page_key(page: Sample, author: str) -> str:
    """Name of a page's reading and all that it depends on."""
    return task_key(author, as_json(page)["images"][0], description_of(page))


def read_page(page: Sample, read: Read, embed: Embed | None) -> dict[str, Any]:
    """Journal entry of a page."""
    try:
        load_image(page["images"][0])
    except ValueError as error:
        return {"id": page["id"], "problem": str(error)}
    reading = read(page["images"][0])
    similarity = None
    if embed is not None:
        original = description_of(page)
        similarity = cosine(*embed([original, reading])) if original.strip() and reading.strip() else 0.0
    return {"id": page["id"], "reading": reading, "similarity": similarity}


def page_sample(page: Sample, reading: str) -> dict[str, Any]:
    """A page with the reading in place of its text."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": reading}]}
    return {
        "id": f"{page['id']}-reread",
        "source": f"re-read {page['source']}",
        "images": as_json(page)["images"],
        "messages": [*page["messages"][:-1], answer],
    }
